"""Who imports what, beyond what import-linter sees. Source: docs/decisions/0001-layers.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "voicetx"
DRIVERS = ("sqlite3", "aiosqlite", "asyncpg", "sqlalchemy.dialects")
OUTSIDE_STORAGE = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "storage"))
MIGRATIONS = sorted((REPOSITORY / "alembic" / "versions").glob("*.py"))


def list_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that code imports, and the names it takes from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_within(name: str, package: str) -> bool:
    """Say whether a module is this package or part of it."""
    return name == package or name.startswith(f"{package}.")


def list_databases(tree: ast.AST) -> list[str]:
    """Return the drivers that code imports, and where it asks which database it is."""
    drivers = [name for name in list_imports(tree) if any(is_within(name, driver) for driver in DRIVERS)]
    return drivers + [
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "dialect"
    ]


@pytest.mark.parametrize("path", OUTSIDE_STORAGE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_storage_names_a_database(path: Path) -> None:
    """Outside `storage` no code imports a driver or asks which database a connection is to."""
    assert list_databases(ast.parse(path.read_text())) == []


def test_what_names_a_database_is_found() -> None:
    """The test before sees each way in which code could."""
    text = "import sqlite3\nfrom sqlalchemy.dialects import postgresql\nfrom sqlalchemy import dialects\nc.dialect.name"

    assert list_databases(ast.parse(text)) == [
        "sqlite3",
        "sqlalchemy.dialects",
        "sqlalchemy.dialects.postgresql",
        "sqlalchemy.dialects",
        "c.dialect",
    ]


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: path.stem)
def test_a_migration_imports_no_code_that_goes_on_living(path: Path) -> None:
    """What a migration does stays the same, whatever becomes of the rules."""
    imported = list_imports(ast.parse(path.read_text()))

    assert [name for name in imported if is_within(name, "voicetx") or name.startswith(".")] == []


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_both_databases_offer_the_operations_that_storage_promises(database: str) -> None:
    """Each database has every operation of `storage/statements.py`, and no more than what it takes to be checked."""

    def list_operations(module: str) -> set[str]:
        tree = ast.parse((PACKAGE / "storage" / f"{module}.py").read_text())
        return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}

    assert list_operations(database) == list_operations("statements") | {"write_nothing"}
