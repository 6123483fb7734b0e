"""Registration: how a deployment gets its transactions, before its dialer calls anybody.

Called by the command line and over HTTP. Transactions are registered many at a time, in few statements, so that a
campaign of hundreds of thousands loads in seconds. Source: docs/contract.md, section 5.
"""

import time
from collections.abc import Collection
from uuid import uuid4

from sqlalchemy import Connection, select, update

from voicetx.campaigns.deployments import require_deployment
from voicetx.counting import tallies
from voicetx.counting.tallies import Sent
from voicetx.storage.schema import UNASSIGNED, voice_transaction, voice_update
from voicetx.storage.statements import match_ids, register, take_now_ms


def register_transactions(connection: Connection, deployment_id: str, ids: Collection[str]) -> set[str]:
    """Register transactions with a deployment; return the ids that belong to another deployment, and stay with it.

    Transactions that an update has registered (under `unassigned`) are taken over. May be repeated.
    Raises `DeploymentError` where there is no such deployment.
    """
    require_deployment(connection, deployment_id)
    register(connection, deployment_id, ids, time.time_ns() // 1_000_000)
    matches, values = match_ids(connection, ids)
    elsewhere = select(voice_transaction.c.transaction_id, voice_transaction.c.deployment_id).where(
        matches, voice_transaction.c.deployment_id != deployment_id
    )
    others = {row.transaction_id: row.deployment_id for row in connection.execute(elsewhere, values)}
    unassigned = {transaction_id for transaction_id, owner in others.items() if owner == UNASSIGNED}
    if unassigned and deployment_id != UNASSIGNED:
        _take_over(connection, deployment_id, unassigned)
    return others.keys() - unassigned


def _take_over(connection: Connection, deployment_id: str, ids: Collection[str]) -> None:
    """Move transactions, and their counts in reports, from `unassigned` to a deployment."""
    matches, values = match_ids(connection, ids)
    taken = connection.execute(
        update(voice_transaction)
        .where(matches, voice_transaction.c.deployment_id == UNASSIGNED)
        .values(deployment_id=deployment_id, registered_at_ms=take_now_ms(connection))
        .returning(voice_transaction),
        values,
    ).all()
    # These rows are locked now, so nobody adds to their history before this is committed.
    history: dict[str, list[Sent]] = {row.transaction_id: [] for row in taken}
    columns = voice_update.c
    sent = select(columns.transaction_id, columns.api_key_id, columns.received_at_ms).where(
        columns.transaction_id.in_(history)
    )
    for transaction_id, api_key_id, received_at_ms in connection.execute(sent):
        history[transaction_id].append(Sent(api_key_id, received_at_ms))
    profiles = {row.transaction_id: tallies.profile(row._mapping) for row in taken}
    lost = [tallies.change(profiles[name], "", removed=updates) for name, updates in history.items()]
    gained = [tallies.change("", profiles[name], added=updates) for name, updates in history.items()]
    tallies.note(connection, UNASSIGNED, lost, registered=-len(taken))
    tallies.note(connection, deployment_id, gained, registered=len(taken))


def mint_transactions(connection: Connection, deployment_id: str, count: int) -> list[str]:
    """Register `count` transactions with new ids and return the ids."""
    ids = [str(uuid4()) for _ in range(count)]
    register_transactions(connection, deployment_id, ids)
    return ids
