"""A campaign under way, made of believable calls, for those who look at pages: the same each time."""

import json
import random
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from voicetx.access import users
from voicetx.access.users import ApiUser, Grant
from voicetx.campaigns.deployments import create_deployment
from voicetx.campaigns.registration import register_transactions
from voicetx.contract.update import parse
from voicetx.recording.batch import Received
from voicetx.recording.recorder import commit_batch

DEPLOYMENT = "spring-renewal"
STORY = "call-000042"
"""The transaction whose updates came late, out of order, and contradict each other."""

_OUTCOMES = (
    (44, "5", "2005"),
    (17, "3", "2002"),
    (9, "3", "1002"),
    (6, "3", "2003"),
    (5, "2", "1005"),
    (4, "2", "1006"),
    (5, "5", "2004"),
    (3, "3", "2001"),
    (3, "2", "1001"),
    (2, "2", "1003"),
    (1, "2", "1004"),
    (1, "4", "2020"),
)
_LENGTH_SECONDS = 5_000
_SENDERS = ("dialer-north", "dialer-south")


def make_campaign(connection: Connection, *, transactions: int = 4_000, reported: int = 2_900) -> None:
    """Make a deployment of which so many transactions were reported in the last hour and a half, evenly spread."""
    chance = random.Random(7)
    now_ms = time.time_ns() // 1_000_000
    create_deployment(connection, "winter-survey", "Winter survey")
    register_transactions(connection, "winter-survey", [f"winter-{number:04}" for number in range(600)])
    create_deployment(connection, DEPLOYMENT, "Spring renewal")
    register_transactions(connection, DEPLOYMENT, [f"call-{number:06}" for number in range(1, transactions + 1)])
    senders = [users.add_user(connection, name, [Grant.TRANSACTIONS_UPDATE])[0] for name in _SENDERS]
    batch = []
    for number in chance.sample(range(1, transactions + 1), reported):
        name = f"call-{number:06}"
        if name == STORY:
            continue
        age_ms = 1000 * _LENGTH_SECONDS - int(1000 * chance.betavariate(1.9, 1.05) * _LENGTH_SECONDS)
        batch.append(_receive(_make_call(chance, name, now_ms - age_ms), now_ms - age_ms, chance.choice(senders)))
    batch += _tell_story(now_ms - 1_800_000, senders)
    batch.sort(key=lambda received: received.received_at_ms)
    for start in range(0, len(batch), 500):
        commit_batch(connection, batch[start : start + 500])


def _make_call(chance: random.Random, name: str, ended_at_ms: int) -> dict[str, str]:
    _, state, code = chance.choices(_OUTCOMES, [weight for weight, *_ in _OUTCOMES])[0]
    is_answered = state == "5"
    seconds = int(chance.lognormvariate(3.9, 0.7)) if is_answered else chance.randint(4, 35)
    call = {
        "transaction-id": name,
        "call-starttime": _write(ended_at_ms - seconds * 1000),
        "call-endtime": _write(ended_at_ms),
        "call-source": "2",
        "call-state": state,
        "drop-code": code,
        "times-attempted": str(chance.choices((1, 2, 3, 4), (70, 20, 7, 3))[0]),
        "b-party": f"+1555{chance.randint(1000000, 9999999)}",
    }
    if is_answered and code == "2005" and chance.random() < 0.7:
        call["dtmf-digits"] = chance.choices(("1", "2", "3", "9", "0", "12", "5#"), (48, 22, 8, 6, 4, 8, 4))[0]
    if is_answered and chance.random() < 0.08:
        call |= {
            "call-source": "3",
            "call-state": "6",
            "trombone-starttime": _write(ended_at_ms - seconds * 500),
            "trombone-endtime": _write(ended_at_ms),
        }
    return call


def _tell_story(start_ms: int, senders: list[ApiUser]) -> list[Received]:
    """Return the updates of one transaction: in order, an attempt more, two late ones, one that contradicts itself."""

    def make(minutes: float, arrives: float, state: str, code: str, attempt: int, **more: str) -> Received:
        body = {
            "transaction-id": STORY,
            "call-starttime": _write(start_ms + (attempt - 1) * 600_000),
            "call-endtime": _write(int(start_ms + minutes * 60_000)),
            "call-source": "2",
            "call-state": state,
            "drop-code": code,
            "times-attempted": str(attempt),
            "b-party": "+15550100042",
        } | {name.replace("_", "-"): value for name, value in more.items()}
        return _receive(body, int(start_ms + arrives * 60_000), senders[attempt % 2])

    return [
        make(0.2, 0.2, "2", "2020", 1),
        make(0.6, 0.7, "3", "2002", 1, drop_reason="No answer"),
        make(10.1, 10.2, "2", "2020", 2),
        make(12.0, 12.1, "5", "1002", 2, message="Gateway reported busy"),
        make(0.4, 12.4, "3", "2020", 1),
        make(12.9, 13.0, "5", "2005", 2, dtmf_digits="1", voice_tag="renewal-en", message="Call finished"),
        make(10.4, 14.2, "3", "2020", 2, voice_recorded="Yes"),
    ]


def _receive(body: dict[str, Any], received_at_ms: int, sender: ApiUser) -> Received:
    return Received(parse(json.dumps(body).encode()), sender.api_key_id, received_at_ms)


def _write(milliseconds: int) -> str:
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    return f"{moment:%Y-%m-%d %H:%M:%S}.{milliseconds % 1000:03}"
