"""The release: the version and the changelog agree, and ops/release.sh refuses what is no release.

The script runs in a small repository whose Makefile only notes what it was asked for.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from voicetx import __version__

ROOT = Path(__file__).parents[1]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, as somebody with a name."""
    named = ("env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
    people = [f"GIT_{role}_{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME=a", "EMAIL=a@example.org")]
    return subprocess.run([*named, *people, *command], cwd=folder, capture_output=True, text=True, check=False)


def commit(folder: Path) -> None:
    """Commit everything."""
    for command in (("git", "add", "."), ("git", "commit", "--quiet", "--allow-empty", "--message", "a")):
        assert run(folder, *command).returncode == 0


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a clean repository of version 7.8.9 that may be released."""
    (tmp_path / "ops").mkdir()
    shutil.copy(ROOT / "ops" / "release.sh", tmp_path / "ops")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "7.8.9"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [7.8.9] - 2026-12-01\n\nAll.\n")
    (tmp_path / "Makefile").write_text("check test package:\n\t@echo made $@\n")
    assert run(tmp_path, "git", "init", "--quiet").returncode == 0
    commit(tmp_path)
    return tmp_path


def list_tags(repository: Path) -> list[str]:
    """Return the repository's tags."""
    return run(repository, "git", "tag").stdout.split()


def test_the_version_has_its_section_in_the_changelog() -> None:
    """pyproject.toml's version is the installed one, and CHANGELOG.md has a section of it with a date."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(re.escape(f"[{__version__}]") + r" - \d{4}-\d\d-\d\d", headings[1])


def test_a_release_is_tagged_after_everything_else(repository: Path) -> None:
    """Checks, tests and packages come first, in this order; then the commit has the version's tag."""
    released = run(repository, "ops/release.sh")
    assert released.returncode == 0, released.stderr
    assert re.findall(r"^made (\w+)$", released.stdout, re.MULTILINE) == ["check", "test", "package"]
    assert list_tags(repository) == ["v7.8.9"]


@pytest.mark.parametrize("target", ["check", "test", "package"])
def test_what_fails_is_not_tagged(target: str, repository: Path) -> None:
    """A check, a test or a package that fails ends the release without a tag."""
    others = " ".join({"check", "test", "package"} - {target})
    (repository / "Makefile").write_text(f"{others}:\n\t@true\n{target}:\n\t@false\n")
    commit(repository)
    assert run(repository, "ops/release.sh").returncode != 0
    assert list_tags(repository) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n"),
        ("CHANGELOG.md", "# Changelog\n\n## [7.8.9]\n"),
        ("CHANGELOG.md", "# Changelog\n\n## [7x8x9] - 2026-12-01\n"),
        ("pyproject.toml", "[project]\n"),
    ],
    ids=["no section", "no date", "another version", "no version"],
)
def test_a_version_without_its_section_is_refused(name: str, text: str, repository: Path) -> None:
    """Nothing is run where the version is missing, or has no section with a date; one sentence says so."""
    (repository / name).write_text(text)
    commit(repository)
    refused = run(repository, "ops/release.sh")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"release: {name} ")
    assert refused.stderr.count("\n") == 1


def test_a_changed_tree_is_refused(repository: Path) -> None:
    """Nothing is run where a file is new or changed."""
    (repository / "new.txt").write_text("new")
    refused = run(repository, "ops/release.sh")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "release: commit or put away what has changed first (git status shows it).\n"


def test_a_version_is_released_once(repository: Path) -> None:
    """Nothing is run where the version has its tag."""
    assert run(repository, "ops/release.sh").returncode == 0
    refused = run(repository, "ops/release.sh")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("release: the tag v7.8.9 is there already")
