"""The versions of PostgreSQL: the tests run on those that the documentation names, and so does the service.

All tests run on the newest; what is closest to the database on the oldest as well (`EVERY_DATABASE`).
"""

import re
from pathlib import Path

import httpx

from bodies import encode, make_body
from platform_side import make_user, register, show
from servers import PostgreSQL, Service
from voicetx.access.users import Grant
from voicetx.contract.update import UPDATE_PATH

ROOT = Path(__file__).parents[1]


def test_the_versions_are_those_that_the_documentation_names() -> None:
    """docs/operations.md names the versions that the tests run on, and compose.yaml starts the newest of them."""
    operations, compose = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/operations.md", "compose.yaml"))
    named = re.search(r"Tested with PostgreSQL ([\d, and]+); `compose.yaml` has (\d+)\.", operations)
    assert named is not None
    assert [int(version) for version in re.findall(r"\d+", named[1])] == PostgreSQL.versions
    assert re.findall(r"image: postgres:(\d+)\n", compose) == [named[2]] == [str(PostgreSQL.versions[-1])]


def test_the_service_serves_on_the_oldest_version(oldest_postgresql: PostgreSQL) -> None:
    """On the oldest version the served program is ready, records, recognises repeats, and reports."""
    url = oldest_postgresql.create_database("served", template="template")
    _, key = make_user(url, grants=list(Grant))
    register(url, ["tx-1", "tx-2"])
    headers = {"authorization": f"Bearer {key}"}
    with Service(url) as service, httpx.Client(base_url=service.base_url, headers=headers) as client:
        for body in (make_body("tx-1"), make_body("tx-1"), make_body("tx-1", times_attempted="2"), make_body("tx-2")):
            assert client.put(UPDATE_PATH, content=encode(body)).status_code == 200
        report = client.get("/api/v1/deployments/campaign/report")
        assert (report.status_code, report.json()["reported"]) == (200, 2)
        assert client.get("/readyz").json()["database"] == "ready"
    assert len(show(url, "tx-1").history) == 2
