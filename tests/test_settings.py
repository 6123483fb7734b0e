"""The settings: every one documented, described and bounded, and a bad value refused with a sentence that names it."""

import math
import os
import re
import subprocess
from enum import Enum
from pathlib import Path
from unittest import mock

import pytest
from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import AfterValidator, ValidationError

from commands import invoke
from voicetx.settings import Settings, describe_faults

ROOT = Path(__file__).parents[1]
FIELDS = Settings.model_fields
NAMES = {f"VOICETX_{name.upper()}": name for name in FIELDS}
NUMBERS = [name for name, field in FIELDS.items() if field.annotation in (int, float)]

# Text that this program neither limits nor checks by itself, and why not.


def read_example() -> dict[str, str]:
    """Return the names and values of `.env.example`, those that are commented out included, in its order."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"#?([A-Z_]+)=(.*)", line) for line in lines]
    pairs = [(match[1], match[2]) for match in found if match]
    assert len(dict(pairs)) == len(pairs), "a name stands there twice"
    return dict(pairs)


def test_the_example_lists_every_setting_in_order() -> None:
    """`.env.example` names every setting, in the order of the program, and no other of this prefix."""
    assert [name for name in read_example() if name.startswith("VOICETX_")] == list(NAMES)


def test_the_example_gives_the_defaults(tmp_path: Path) -> None:
    """What `.env.example` says of a setting is what holds without it."""
    # An empty value stands for a setting that is not given.
    lines = [f"{name}={value}\n" for name, value in read_example().items() if value]
    file = tmp_path / "example"
    file.write_text("".join(lines), encoding="utf-8")
    assert Settings(_env_file=file) == Settings(_env_file=None)
    assert [NAMES[name] for name, value in read_example().items() if name in NAMES and not value] == [
        name for name, field in FIELDS.items() if field.default in (None, "")
    ]


def test_a_copy_of_the_example_changes_nothing() -> None:
    """A copied `.env.example` sets nothing by itself, so that defaults of a later release reach its owner."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == ["POSTGRES_PASSWORD="]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_describes_each_setting(name: str) -> None:
    """In `.env.example` the comment above a setting holds its description and, of a number, its bounds."""
    paragraphs = (ROOT / ".env.example").read_text(encoding="utf-8").split("\n\n")
    (paragraph,) = [text for text in paragraphs if re.search(rf"^#{name}=", text, re.MULTILINE)]
    comment = " ".join(line.removeprefix("#").strip() for line in paragraph.splitlines()[:-1])
    field = FIELDS[NAMES[name]]
    assert field.description is not None
    assert field.description.rstrip(".") in comment
    if NAMES[name] in NUMBERS:
        lowest, highest = bounds(NAMES[name])
        assert f"{lowest:,} to {highest:,}." in comment


def test_the_manual_lists_every_setting() -> None:
    """docs/operations.md has every setting in a table, and names none that does not exist."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    tabled = set(re.findall(r"^\|.*?`(VOICETX_[A-Z_]+)", text, re.MULTILINE))
    assert not NAMES.keys() - tabled
    assert not set(re.findall(r"VOICETX_[A-Z_]*[A-Z]", text)) - NAMES.keys()


def bounds(name: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a number may have."""
    metadata = FIELDS[name].metadata
    (lowest,) = [item.ge for item in metadata if isinstance(item, Ge)]
    (highest,) = [item.le for item in metadata if isinstance(item, Le)]
    assert isinstance(lowest, int | float)
    assert isinstance(highest, int | float)
    return lowest, highest


@pytest.mark.parametrize("name", FIELDS)
def test_each_setting_is_described(name: str) -> None:
    """A setting has a description that is a sentence."""
    assert re.fullmatch(r"[A-Z].{15,}\.", FIELDS[name].description or "")


@pytest.mark.parametrize("name", FIELDS)
def test_each_setting_is_bounded(name: str) -> None:
    """A number has a lowest and a highest value; a text choices, a length or a check, or a reason for none."""
    field = FIELDS[name]
    if name in NUMBERS:
        lowest, highest = bounds(name)
        assert lowest <= field.default <= highest
        return
    has_choices = isinstance(field.annotation, type) and issubclass(field.annotation, Enum | bool)
    is_checked = any(isinstance(item, AfterValidator | MinLen | MaxLen) for item in field.metadata)
    assert has_choices or is_checked


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_refused_beyond_its_bounds(name: str) -> None:
    """A number is taken at both of its bounds and refused beyond them, and when it is none."""
    lowest, highest = bounds(name)
    for value in (lowest, highest):
        assert getattr(Settings(**{name: value}), name) == value
    for bad in (lowest - 1, highest + 1, math.nan, math.inf, "many", ""):
        with pytest.raises(ValidationError):
            Settings(**{name: bad})


BAD_VALUES = [
    ("VOICETX_THROTTLE", "fast"),
    ("VOICETX_THROTTLE", "0/hour"),
    ("VOICETX_THROTTLE", "1/second;2/minute"),
    ("VOICETX_SIGN_IN_THROTTLE", ""),
    ("VOICETX_TIMEZONE", "Europe/Atlantis"),
    ("VOICETX_DATABASE_URL", "mysql://root:secret@localhost/calls"),
    ("VOICETX_DATABASE_URL", "sqlite:///:memory:"),
    ("VOICETX_REDIS_URL", "http://localhost:6379"),
    ("VOICETX_REDIS_URL", "redis://:secret@localhost:port"),
    ("VOICETX_REDIS_URL", "localhost"),
    ("VOICETX_TRUSTED_PROXIES", "10.0.0.0/8, proxy"),
    ("VOICETX_HOST", ""),
    ("VOICETX_PORT", "70000"),
    ("VOICETX_WORKERS", "-1"),
    ("VOICETX_UNKNOWN_TRANSACTIONS", "ignore"),
]


def check_database(**variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that reads the settings, in the test's own folder, where it finds the test's `.env`."""
    given = {"VOICETX_DATABASE_URL": "sqlite:///calls.db"} | variables
    with mock.patch.dict(os.environ, given):
        return invoke(given["VOICETX_DATABASE_URL"], "db", "check")


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_with_a_sentence(name: str, value: str, tmp_path: Path) -> None:
    """A bad value is refused with one sentence that names its variable and does not repeat what may be secret."""
    done = check_database(**{name: value})
    assert done.returncode == 1
    assert not done.stdout
    assert re.fullmatch(rf"{name}: [A-Za-z][^\n{{}}]{{10,}}\.\n", done.stderr.removeprefix("Error: "))
    assert not value or value not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*Settings.model_fields])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_value_is_refused_where_it_means_nothing(name: str, value: str, tmp_path: Path) -> None:
    """An empty variable is a slip, most of all that of the database; only where empty is the default it is taken."""
    (tmp_path / ".env").write_text(f"VOICETX_{name.upper()}={value}\n", encoding="utf-8")
    if Settings.model_fields[name].default in {"", None}:
        assert getattr(Settings(), name) == Settings.model_fields[name].default
        return
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert describe_faults(caught.value) == [
        f"VOICETX_{name.upper()}: is empty; give it a value, or remove the variable for the default."
    ]


def test_every_bad_value_is_named_at_once(tmp_path: Path) -> None:
    """The program names all variables at fault, those of the file `.env` included, and not only the first."""
    (tmp_path / ".env").write_text("VOICETX_PORT=http\n", encoding="utf-8")
    done = check_database(VOICETX_WORKERS="1000")
    assert done.returncode == 1
    assert "VOICETX_PORT: " in done.stderr
    assert "VOICETX_WORKERS: " in done.stderr


def test_the_environment_counts_more_than_the_file(tmp_path: Path) -> None:
    """A variable of the environment overrides the same one in the file `.env`."""
    (tmp_path / ".env").write_text("VOICETX_TIMEZONE=Europe/Atlantis\nVOICETX_WORKERS=65\n", encoding="utf-8")
    done = check_database(VOICETX_TIMEZONE="Europe/Berlin")
    assert "VOICETX_TIMEZONE" not in done.stderr
    assert "VOICETX_WORKERS: " in done.stderr


def test_an_empty_redis_address_means_none() -> None:
    """Without an address, or with an empty one, each process counts its own calls."""
    assert Settings(_env_file=None, redis_url="").redis_url is None
    assert Settings(_env_file=None).redis_url is None
