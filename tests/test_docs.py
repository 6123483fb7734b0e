"""The documentation: what README.md and docs/ say of the code is held to the code.

The settings' table is held by test_settings.py, the Postman page by test_postman.py.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from bodies import TROMBONE, encode, make_body
from voicetx.cli import app
from voicetx.contract.codes import DROP_CODES
from voicetx.contract.fields import WIRE_NAMES, TromboneBody, UpdateBody
from voicetx.contract.refusals import Challenge, Refusal, Rejected
from voicetx.contract.update import UPDATE_METHODS, UPDATE_PATH, parse

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "voicetx"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("postman/*.md"), *ROOT.glob("bench/*.md"))
)


def name_page(page: Path) -> str:
    """Return how a page is called in a test's id."""
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_page)


def read_code(page: Path) -> list[str]:
    """Return what a page shows as code: spans between backticks, and the lines of its blocks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    blocks = [match[1].splitlines() for match in re.finditer(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks.append(re.findall(r"^(?: {4}|\t)(.+)$", text, re.MULTILINE))
    return [*re.findall(r"`([^`\n]+)`", text), *(line.strip() for block in blocks for line in block)]


def read_section(text: str, heading: str) -> str:
    """Return what stands below a heading of the second level."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def split_words(line: str) -> list[str]:
    """Return the words of a line as a shell would, comments left out, or none of a line that is no command."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def find_commands(page: Path) -> Iterator[list[str]]:
    """Return the arguments of each `voicetx` command that a page shows."""
    for line in read_code(page):
        words = split_words(line)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words[:2] == ["docker", "exec"] or words[:3] == ["docker", "compose", "exec"]:
            words = words[words.index("voicetx") + 1 :]
        if words and words[0] in {"voicetx", ".venv/bin/voicetx"}:
            yield words[1:]


def check_command(arguments: list[str]) -> str | None:
    """Return what is wrong with a command line, or None."""
    command = get_command(app)
    words = list(arguments)
    while isinstance(command, TyperGroup) and words:
        name = words.pop(0)
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    for word in words:
        if word.startswith("--") and word not in options:
            return f"no option {word}"
    return None


@pytest.mark.parametrize(
    ("page", "heading"),
    [("README.md", "Answers"), ("docs/contract.md", "3. Answers")],
    ids=["README", "contract"],
)
def test_the_table_of_answers_is_the_codes(page: str, heading: str) -> None:
    """The page's table has exactly the rows of `Refusal`: status, code and description, verbatim."""
    section = read_section((ROOT / page).read_text(encoding="utf-8"), heading)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*?) \| .*\|$", section, re.MULTILINE)
    found = [(int(status), int(code), description) for status, code, description in rows]
    assert sorted(found) == sorted((refusal.status, refusal.code, refusal.description) for refusal in Refusal)


def read_fields() -> dict[str, tuple[str, str]]:
    """Return the fields of the contract's table, in its order, each with its letter and its rule."""
    section = read_section((ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), "2. Body fields")
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    return {name: (letter, rule) for names, letter, rule in rows for name in re.findall(r"`([\w-]+)`", names)}


def read_drop_codes() -> dict[str, tuple[str, str, str, str]]:
    """Return the contract's table of drop codes by code: text, meaning, before or after an answer, whether an end."""
    section = read_section((ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), "2. Body fields")
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (\w+) \| (\w+) \|$", section, re.MULTILINE)
    return {code: (text, meaning, timing, end) for code, text, meaning, timing, end in rows}


def test_the_table_of_drop_codes_is_the_codes() -> None:
    """Section 2 of the contract has the drop codes of `voicetx.contract.codes`, all that they say, in their order."""
    known = {
        code: (drop.text, drop.meaning, drop.timing, "yes" if drop.is_end else "no")
        for code, drop in DROP_CODES.items()
    }
    assert list(read_drop_codes().items()) == list(known.items())


def is_taken(field: str, value: str) -> bool:
    """Say whether an update may have that value in a field; of a call that was transferred where it has to be."""
    is_trombone = field.startswith("trombone") or (field, value) == ("call-source", "3")
    body = make_body(**(TROMBONE if is_trombone else {})) | {field: value}
    try:
        return bool(parse(encode(body)))
    except Rejected:
        return False


def test_the_table_of_fields_is_the_models() -> None:
    """Section 2 of the contract has the models' fields in their order, and says truly which are mandatory, and when."""
    letters = {
        WIRE_NAMES[name]: "M" if field.is_required() else "C" if TromboneBody.model_fields[name].is_required() else "-"
        for name, field in UpdateBody.model_fields.items()
    }
    tabled = {name: letter for name, (letter, _) in read_fields().items()}
    assert list(tabled.items()) == list(letters.items())


@pytest.mark.parametrize("field", WIRE_NAMES.values())
def test_a_rule_of_the_table_of_fields_is_the_models(field: str) -> None:
    """What section 2 of the contract says that a field may hold is what is taken, and what it lists is listed whole."""
    name = field.replace("-", "_")
    _, rule = read_fields()[field]
    kinds = [get_args(kind.model_fields[name].annotation) for kind in (UpdateBody, TromboneBody)]
    choices = {value for kind in kinds for part in kind for value in (get_args(part) or [part]) if type(value) is str}
    limit = re.search(r"(?:at most|[01] to) ([\d,]+)", rule)
    if choices:
        meanings = dict(re.findall(r"`(\w+)`(?: ([^`;,]+))?", rule))
        if field == "drop-code":
            meanings = {code: text for code, (text, *_) in read_drop_codes().items()}
        assert meanings.keys() == choices
        told = dict(re.findall(r"(\d+) \((.*?)\)", str(UpdateBody.model_fields[name].description)))
        for value, meaning in told.items():
            words = [re.findall(r"\w+", text) for text in (meaning, meanings[value])]
            assert words[1][: len(words[0])] == words[0]
        assert all(is_taken(field, value) for value in choices)
        assert not is_taken(field, "x")
    elif limit is not None:
        most = int(limit[1].replace(",", ""))
        is_number = "whole number" in rule
        longest, longer = (str(most), str(most + 1)) if is_number else ("1" * most, "1" * (most + 1))
        assert is_taken(field, longest)
        assert not is_taken(field, longer)
    else:
        moment = "2026-03-01 09:00:30.000"
        assert is_taken(field, moment)
        assert not any(is_taken(field, wrong) for wrong in (moment[:-1], "2026-02-30 09:00:30.000", "x"))


def test_the_table_of_challenges_is_the_codes() -> None:
    """The contract's table of mistakes has exactly those of `Challenge`, each with its error and sentence."""
    section = read_section((ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), "3. Answers")
    rows = re.findall(r"^\| (?:498|430) \| (?:none|`(\w+)`) \| (.*?) \|$", section, re.MULTILINE)
    assert rows == [(challenge.error or "", challenge.description) for challenge in Challenge]


@pytest.mark.parametrize(
    ("words", "home"),
    [
        (r"voice[_-]tag|drop[_-]reason", "fields.py"),
        (r"""["'](?:1001|1003|1007|2001|2004|2006)["']""", "codes.py"),
    ],
    ids=["fields", "drop codes"],
)
def test_fields_and_drop_codes_stand_in_one_place(words: str, home: str) -> None:
    """As CONTRIBUTING.md says, no other source or page names what has no part of its own, but who makes up calls."""
    named = {
        path.name
        for path in SOURCES.rglob("*")
        if path.suffix in {".py", ".html", ".js"} and re.search(words, path.read_text(encoding="utf-8"))
    }
    assert named - {"simulation.py"} == {home}


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    """Each link to a file of this repository leads to one that git keeps, or that is about to be added."""
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))]
    missing = [
        target for target in targets if target and "://" not in target and not (page.parent / target).resolve().exists()
    ]
    assert not missing


@every_page
def test_lines_of_prose_have_at_most_120_columns(page: Path) -> None:
    """Outside of tables and code, no line of a page is longer than a line of code may be."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = [line for line in text.splitlines() if not line.startswith("    ") and not line.lstrip().startswith("|")]
    assert not [line for line in prose if len(line) > 120]


def test_the_readme_is_read_in_a_minute() -> None:
    """README has at most 150 lines; what does not fit stands in docs/."""
    assert len(README.splitlines()) <= 150


def test_the_index_names_every_page() -> None:
    """docs/README.md leads to each page of docs/ and to each decision."""
    docs = ROOT / "docs"
    text = (docs / "README.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(docs)) for page in docs.glob("**/*.md")} - {"README.md"}
    assert set(re.findall(r"\]\(([\w/.-]+\.md)\)", text)) == pages


def test_there_are_pages_commands_and_links() -> None:
    """The tests of this module find what they are to judge."""
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/contract.md", "docs/operations.md"} <= {
        name_page(page) for page in PAGES
    }
    assert "](docs/contract.md)" in README
    commands = [" ".join(arguments[:2]) for page in PAGES for arguments in find_commands(page)]
    assert {"serve --host", "user add", "transaction show", "db upgrade"} <= set(commands)


@every_page
def test_every_command_exists(page: Path) -> None:
    """Each `voicetx ...` that a page shows is a command of the program, and its options are that command's."""
    wrong = [(arguments, fault) for arguments in find_commands(page) if (fault := check_command(arguments))]
    assert not wrong


def test_the_table_of_commands_names_every_command() -> None:
    """The table in docs/command-line.md has every command of the program."""
    program = get_command(app)
    assert isinstance(program, TyperGroup)
    names: set[str] = set()
    for name, command in program.commands.items():
        names |= {f"{name} {below}" for below in command.commands} if isinstance(command, TyperGroup) else {name}
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    tabled = re.findall(r"`voicetx ([^`]+)`", read_section(page, "Commands"))
    assert set(tabled) == names


@every_page
def test_every_make_target_exists(page: Path) -> None:
    """Each `make ...` that a page shows is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    lines = [split_words(line) for line in read_code(page)]
    named = {words[1] for words in lines if len(words) > 1 and words[0] == "make"}
    assert not named - targets


def test_the_readmes_curl_line_is_an_update() -> None:
    """README's curl line goes to the update path, with one of its methods and a body that the contract accepts."""
    (line,) = [line for line in read_code(ROOT / "README.md") if line.startswith("curl") and UPDATE_PATH in line]
    words = shlex.split(line)
    assert words[2] in UPDATE_METHODS
    assert words[3].endswith(f":8000{UPDATE_PATH}")
    assert parse(words[words.index("-d") + 1].encode()).transaction_id == "demo-001"


def test_every_room_is_in_the_table() -> None:
    """README's table of rooms names every package, and every module that is in none is named below it."""
    section = read_section(README, "Where the code is")
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {
        path.parent.name for path in SOURCES.glob("*/__init__.py")
    }
    assert {f"{name}.py" for name in re.findall(r"`(\w+)\.py`", section)} == {
        path.name for path in SOURCES.glob("*.py") if not path.name.startswith("__")
    }


def test_decisions_are_numbered() -> None:
    """Each decision has a number of its own, in its title too, a date, a status, and the three parts of a record."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [int(decision.name.partition("-")[0]) for decision in decisions]
    assert len(set(numbers)) == len(numbers)
    for number, decision in zip(numbers, decisions, strict=True):
        text = decision.read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. ")
        assert re.search(r"^Status: (accepted|superseded)", text, re.MULTILINE)
        assert re.search(r"^Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]


def test_what_the_code_cites_exists() -> None:
    """Each page of docs/ that the code, the tests and the other files cite is there, and so is each section."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.toml", "*.yaml", "Makefile"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    texts = [path.read_text(encoding="utf-8") for name in listed.stdout.split() if (path := ROOT / name).exists()]
    cited = {name for text in texts for name in re.findall(r"docs/[\w/-]+\.md", text)}
    assert "docs/decisions/0003-inconsistent.md" in cited
    assert not [name for name in cited if not (ROOT / name).exists()]
    sections = {number for text in texts for number in re.findall(r"[Cc]ontract,? sections? (\d)", text)}
    contract = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (\d)\. ", contract, re.MULTILINE))
    assert {"3", "5"} <= sections <= headings


def test_every_event_of_the_log_is_described() -> None:
    """docs/operations.md names every event that the code logs."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py"))
    logged = re.findall(r"""(?:log|get_logger\(__name__\))\.(?:info|warning|error|exception)\(\s*f?"([^"]*)\"""", code)
    events = {*logged, *re.findall(r'"event": "([^"]*)"', code)}
    assert events >= {"request.failed", "duty.failed", "service.starting"}
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert not [event for event in sorted(events) if f"`{event}`" not in text]
