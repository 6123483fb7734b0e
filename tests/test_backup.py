"""`voicetx db backup`: a copy taken while the service writes is a whole database, and nobody waits for it."""

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from bodies import encode, make_body
from commands import fail, invoke, run
from dialer import read_history
from platform_side import make_user, register, run_on, show
from servers import Service, run_command, wait_until
from voicetx.contract.update import UPDATE_PATH, parse
from voicetx.storage import backup
from voicetx.storage.backup import BackupRefused, Content, back_up
from voicetx.storage.migrations import HEAD


def test_a_backup_under_load_holds_all_that_was_acknowledged(tmp_path: Path) -> None:
    """Taken while updates are written, the copy is sound and has every update acknowledged before it began."""
    source = tmp_path / "voicetx.db"
    url = f"sqlite:///{source}"
    run(url, "db", "upgrade")
    _, key = make_user(url)
    register(url, [f"tx-{number}" for number in range(50)])
    acknowledged: set[tuple[str, bytes]] = set()
    answers: list[int] = []
    is_over = threading.Event()
    with Service(url) as service:

        def send(client_number: int) -> None:
            with httpx.Client(base_url=service.base_url, headers={"authorization": f"Bearer {key}"}) as client:
                for turn in range(100_000):
                    if is_over.is_set():
                        return
                    body = encode(make_body(f"tx-{turn % 50}", message=f"{client_number}.{turn}", padding="x" * 2_000))
                    answers.append(client.put(UPDATE_PATH, content=body, timeout=30).status_code)
                    update = parse(body)
                    acknowledged.add((update.transaction_id, update.digest))

        with ThreadPoolExecutor(8) as pool:
            sending = [pool.submit(send, number) for number in range(8)]
            try:
                for number in range(2):
                    wait_until(lambda: len(answers) > 300 * (number + 1), "There were no answers")  # noqa: B023 - at once
                    before, count = set(acknowledged), len(answers)
                    target = tmp_path / f"backup-{number}.db"
                    done = run_command(url, "db", "backup", str(target))
                    assert (done.returncode, done.stderr) == (0, "")
                    assert target.stat().st_mode & 0o777 == 0o600
                    assert before <= read_history(f"sqlite:///{target}")
                    with closing(sqlite3.connect(target)) as copy:
                        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                    assert len(answers) > count
            finally:
                is_over.set()
            for future in sending:
                future.result()
    assert set(answers) == {200}


def test_a_copy_is_not_begun_anew_by_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often somebody commits while pages are copied, the copy is of the moment at which it began."""
    monkeypatch.setattr(backup, "_PAGES_AT_ONCE", 1)
    source = tmp_path / "voicetx.db"
    url = f"sqlite:///{source}"
    run(url, "db", "upgrade")
    register(url, [f"tx-{number}" for number in range(500)])
    steps: list[int] = []

    def commit(done: int, _total: int) -> None:
        if len(steps) < 20:
            register(url, [f"late-{len(steps)}"], f"late-{len(steps)}")
        steps.append(done)

    back_up(source, tmp_path / "backup.db", commit)
    assert steps == list(range(1, len(steps) + 1))
    copied = run_on(f"sqlite:///{tmp_path / 'backup.db'}", lambda c: c.exec_driver_sql(COUNT).scalar())
    assert (copied, run_on(url, lambda c: c.exec_driver_sql(COUNT).scalar())) == (500, 520)


COUNT = "SELECT count(*) FROM voice_transaction"


def test_a_backup_is_a_database_to_go_on_from(tmp_path: Path) -> None:
    """Commands work on a backup as on the database itself, and it shows what was there."""
    url, target = f"sqlite:///{tmp_path / 'voicetx.db'}", tmp_path / "backup.db"
    run(url, "db", "upgrade")
    register(url, ["tx-1"])
    make_user(url)
    assert run(url, "db", "backup", str(target)) == (
        f"{target} is a backup, as of when this command began: 1 API users, 1 deployments, 1 transactions, 0 updates,"
        f" at schema {HEAD}.\n"
    )
    (tmp_path / "voicetx.db").unlink()
    run(f"sqlite:///{target}", "db", "check")
    assert show(f"sqlite:///{target}", "tx-1").deployment_id == "campaign"


def test_a_backup_never_overwrites(tmp_path: Path) -> None:
    """A file that is there stays as it is, also where it appears while the copy is made; no draft is left behind."""
    url, target = f"sqlite:///{tmp_path / 'voicetx.db'}", tmp_path / "backup.db"
    run(url, "db", "upgrade")
    target.write_text("mine")
    assert "is there already" in fail(url, "db", "backup", str(target))
    assert target.read_text() == "mine"
    late = tmp_path / "late.db"
    with pytest.raises(BackupRefused, match="is there already"):
        back_up(tmp_path / "voicetx.db", late, lambda *_: late.write_text("mine") and None)
    assert late.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {
        "backup.db",
        "late.db",
        "voicetx.db",
        "voicetx.db-wal",
        "voicetx.db-shm",
    }


def test_a_backup_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """Stopped half-way, there is neither a backup nor a draft of one."""
    url = f"sqlite:///{tmp_path / 'voicetx.db'}"
    run(url, "db", "upgrade")

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(tmp_path / "voicetx.db", tmp_path / "backup.db", stop)
    assert not list(tmp_path.glob("backup*"))


def test_what_cannot_be_backed_up_is_a_sentence(tmp_path: Path) -> None:
    """A database that is not there is not made, PostgreSQL is left to its tools, and no other file is copied."""
    missing = tmp_path / "missing.db"
    complaint = fail(f"sqlite:///{missing}", "db", "backup", str(tmp_path / "a.db"))
    assert "there is no such database" in complaint
    assert "voicetx db upgrade" in complaint
    assert not missing.exists()
    assert "pg_dump" in fail("postgresql://nobody@127.0.0.1:1/x", "db", "backup", str(tmp_path / "b.db"))
    url = f"sqlite:///{tmp_path / 'voicetx.db'}"
    run(url, "db", "upgrade")
    complaint = fail(url, "db", "backup", str(tmp_path / "no-folder" / "c.db"))
    assert "No such file or directory" in complaint
    assert f"{tmp_path / 'no-folder'} " in complaint
    assert "c.db" not in complaint
    (tmp_path / "text.db").write_text("no database at all, but a text that is long enough for a header" * 100)
    assert "The backup was not made" in fail(
        f"sqlite:///{tmp_path / 'text.db'}", "db", "backup", str(tmp_path / "d.db")
    )
    assert not list(tmp_path.glob("[abcd].db*"))


def test_what_is_not_a_whole_copy_is_no_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an empty file, nor a damaged copy, nor one that holds less than the database held is called a backup."""
    url, source = f"sqlite:///{tmp_path / 'voicetx.db'}", tmp_path / "voicetx.db"
    source.touch()
    assert "holds no voicetx tables" in fail(url, "db", "backup", "a.db")
    run(url, "db", "upgrade")
    register(url, [f"tx-{number}" for number in range(5_000)])
    copy = backup._copy

    def copy_and(spoil: Callable[[Path], None]) -> None:
        def copy_badly(source: Path, draft: Path, follow: Callable[[int, int], None]) -> Content:
            content = copy(source, draft, follow)
            spoil(draft)
            return content

        monkeypatch.setattr(backup, "_copy", copy_badly)

    def lose(draft: Path) -> None:
        with closing(sqlite3.connect(draft)) as connection:
            connection.execute("DELETE FROM voice_transaction WHERE transaction_id = 'tx-7'")
            connection.commit()

    def damage(draft: Path) -> None:
        with draft.open("r+b") as file:
            file.seek(draft.stat().st_size // 2)
            file.write(b"\xff" * 4_096)

    copy_and(lose)
    assert "4,999 transactions" in fail(url, "db", "backup", "b.db")
    copy_and(damage)
    assert "The backup was not made" in fail(url, "db", "backup", "c.db")
    assert not list(tmp_path.glob("[abc].db*"))


def test_an_old_database_is_backed_up_as_it_is(tmp_path: Path) -> None:
    """A backup before an upgrade is of the old schema: the command upgrades nothing."""
    url, target = f"sqlite:///{tmp_path / 'voicetx.db'}", tmp_path / "backup.db"
    run(url, "db", "upgrade")
    run_on(url, lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'"))
    assert invoke(url, "db", "backup", str(target)).returncode == 0
    with closing(sqlite3.connect(target)) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]


def test_another_applications_database_is_no_backup(tmp_path: Path) -> None:
    """A file with a table of migrations and none of ours is not called a backup, whatever the version there."""
    source, target = tmp_path / "theirs.db", tmp_path / "backup.db"
    with closing(sqlite3.connect(source)) as theirs, theirs:
        theirs.execute("CREATE TABLE alembic_version (version_num TEXT)")
        theirs.execute("INSERT INTO alembic_version VALUES (?)", [HEAD])
    assert "holds no voicetx tables" in fail(f"sqlite:///{source}", "db", "backup", str(target))
    assert not target.exists()


def test_a_spoilt_database_is_backed_up_before_it_is_mended(tmp_path: Path) -> None:
    """With several versions of the schema, or none, the copy is made, and what is wrong with it is said."""
    url = f"sqlite:///{tmp_path / 'voicetx.db'}"
    run(url, "db", "upgrade")
    run_on(url, lambda connection: connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0001')"))
    assert f"at schema 0001 and {HEAD}." in run(url, "db", "backup", str(tmp_path / "two.db"))
    run_on(url, lambda connection: connection.exec_driver_sql("DELETE FROM alembic_version"))
    assert "at schema unknown." in run(url, "db", "backup", str(tmp_path / "none.db"))
