"""What pyproject.toml asks of packages: nobody gets one that is known to be too old, and the locks keep to it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}


def read_lock(name: str) -> dict[str, Version]:
    """Return the version that a lock has of each package."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(package): Version(version) for package, version in lines}


@pytest.mark.parametrize("name", sorted(REQUIREMENTS))
def test_every_dependency_has_a_lower_bound(name: str) -> None:
    """A package is asked for from a release on, so that no resolver can take one that the code does not run with."""
    assert {specifier.operator for specifier in REQUIREMENTS[name].specifier} == {">="}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_the_locked_versions_are_those_that_are_asked_for(lock: str) -> None:
    """What is locked is no older than what is asked for, and nothing is left out."""
    locked = read_lock(lock)
    asked = {name: requirement for name, requirement in REQUIREMENTS.items() if name in locked or "dev" not in lock}
    assert asked
    assert [name for name, requirement in asked.items() if locked[name] not in requirement.specifier] == []
