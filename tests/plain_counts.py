"""What the tallies have to say: a plain count over all rows, and the tallies read in the same form."""

from collections import Counter
from datetime import datetime

from sqlalchemy import Connection, select

from voicetx.contract.codes import is_final
from voicetx.counting import tallies
from voicetx.counting.tallies import Counts, Measure
from voicetx.storage.schema import deployment, voice_transaction, voice_update


def count_plainly(connection: Connection) -> dict[str, Counts]:
    """Count every transaction and update, one by one, by the definitions of docs/reports.md."""
    found: dict[str, Counts] = {}
    deployments: dict[str, str] = {}
    for row in connection.execute(select(voice_transaction)).mappings():
        deployments[row["transaction_id"]] = row["deployment_id"]
        counts = found.setdefault(row["deployment_id"], Counter())
        counts[Measure.REGISTERED, ""] += 1
        if row["attempt"] is None:
            assert not row["finished"]
            continue
        assert row["finished"] == is_final(row["call_state"], row["drop_code"])
        counts[Measure.OUTCOME, f"{row['call_state']}.{row['drop_code']}"] += 1
        counts[Measure.ATTEMPTS, str(row["attempt"])] += 1
        if row["call_state"] in {"5", "6"}:
            counts[Measure.TALK, seconds(row["call_starttime"], row["call_endtime"])] += 1
        if row["call_source"] == "3":
            counts[Measure.TRANSFER, seconds(row["trombone_starttime"], row["trombone_endtime"])] += 1
        if row["dtmf_digits"]:
            counts[Measure.PRESSED, ""] += 1
            for key in row["dtmf_digits"].replace("x", ""):
                counts[Measure.KEY, key] += 1
    for row in connection.execute(select(voice_update)).mappings():
        counts = found[deployments[row["transaction_id"]]]
        counts[Measure.SENDER, row["api_key_id"].hex] += 1
        counts[Measure.MINUTE, str(row["received_at_ms"] // 60_000)] += 1
    return found


def seconds(start: str, end: str) -> str:
    """Return the whole seconds between two moments of the wire, at most a day."""
    return str(int(min(86_400, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())))


def read_tallies(connection: Connection) -> dict[str, Counts]:
    """Return the tallies of every deployment that has any."""
    ids = connection.execute(select(deployment.c.deployment_id)).scalars().all()
    totals = tallies.read_registered(connection)
    found = {}
    for deployment_id in ids:
        counts = tallies.read(connection, deployment_id)
        reported = sum(number for (measure, _), number in counts.items() if measure is Measure.OUTCOME)
        assert totals.get(deployment_id, (0, 0)) == (counts[Measure.REGISTERED, ""], reported)
        if +counts:
            found[deployment_id] = counts
    return found
