"""The endpoints' answers as models, from which the schemas of the OpenAPI document are made.

The answers themselves are made by functions in `voicetx.reading`, not from these models, so nothing here runs while a
request is answered. Tests compare answers with this document.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Recorded(BaseModel):
    """The update is durably committed; a repeat of it answers the same."""

    transaction_id: str = Field(alias="transaction-id", description="the id that was sent", examples=["demo-001"])


class FieldFault(BaseModel):
    """What is wrong with one field; a value is never echoed."""

    field: str = Field(description="its name; empty where the body as a whole is at fault")
    reason: str


class Refused(BaseModel):
    """A refusal: tell it from a success by these keys, not by the HTTP status."""

    code: int
    description: str
    errors: list[FieldFault] | None = Field(None, description="one for every field at fault, in body order")


class ShownUpdate(BaseModel):
    """An update as it came in."""

    received_at: str = Field(description="RFC 3339, UTC", examples=["2026-01-31T08:02:00.123Z"])
    api_user: str = Field(description="who sent it: its name, or its API key id where it is deleted")
    repeats: int = Field(description="how often it came again; counted a few seconds late")
    body: dict[str, Any] = Field(description="as received, unknown fields included; masked as the fields are")


class ShownTransaction(BaseModel):
    """A transaction as its updates have made it; beside these names stand the contract's fields that were given."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": {"type": "string", "description": "a field by its wire name"}}
    )

    transaction_id: str = Field(alias="transaction-id", examples=["demo-001"])
    deployment: str
    inconsistent: bool = Field(description="whether call-state and drop-code contradict each other")
    updates: int = Field(description="how many different updates were recorded")
    history: list[ShownUpdate] = Field(description="oldest first")


class ShownDeployment(BaseModel):
    """A deployment: a campaign run."""

    deployment: str = Field(examples=["spring-2026"])
    name: str = Field(examples=["Spring, second wave"])
    transactions: int = Field(description="how many are registered", examples=[100])
    reported: int = Field(description="of how many something was reported", examples=[42])
    created_at: str = Field(description="RFC 3339, UTC", examples=["2026-01-31T08:00:00.000Z"])


class ShownDeployments(BaseModel):
    """The deployments, oldest first."""

    deployments: list[ShownDeployment]


class StateCount(BaseModel):
    """Reported transactions of a call-state."""

    call_state: str = Field(alias="call-state", examples=["5"])
    text: str = Field(examples=["answered or connected"])
    transactions: int


class CodeCount(BaseModel):
    """Reported transactions of a drop-code."""

    drop_code: str = Field(alias="drop-code", examples=["2002"])
    text: str = Field(examples=["no answer"])
    meaning: str = Field(description="what it means for the campaign", examples=["try again later"])
    transactions: int


class OutcomeCount(BaseModel):
    """Reported transactions of a call-state and a drop-code."""

    call_state: str = Field(alias="call-state", examples=["5"])
    drop_code: str = Field(alias="drop-code", examples=["2005"])
    transactions: int


class AttemptCount(BaseModel):
    """Reported transactions of a number of attempts."""

    times_attempted: int = Field(alias="times-attempted", examples=[1])
    transactions: int


class MinuteCount(BaseModel):
    """Different updates that came in within a minute."""

    minute: str = Field(
        description="its beginning, RFC 3339, in the time zone asked for", examples=["2026-01-31T08:02Z"]
    )
    updates: int


class SenderCount(BaseModel):
    """Different updates of an API user."""

    api_user: str = Field(description="its name, or its API key id where it is deleted")
    updates: int


class ShownDurations(BaseModel):
    """How many there were, and how long: whole seconds, by nearest rank."""

    count: int
    total_seconds: int
    median_seconds: int | None
    p90_seconds: int | None


class ShownReport(BaseModel):
    """A deployment's numbers; docs/reports.md defines each."""

    deployment: str = Field(examples=["spring-2026"])
    name: str
    created_at: str = Field(description="RFC 3339, in the time zone asked for")
    time_zone: str = Field(examples=["UTC"])
    transactions: int = Field(description="how many are registered")
    reported: int = Field(description="of how many something was reported")
    unreported: int = Field(description="of how many nothing was reported")
    unfinished: int = Field(description="of how many what was reported leaves open how the call ended")
    answered: int = Field(description="how many calls a person answered")
    answer_rate: float | None = Field(description="the share of finished calls that a person answered", examples=[0.42])
    inconsistent: int = Field(description="of how many call-state and drop-code contradict each other")
    updates: int = Field(description="how many different updates came in")
    by_meaning: dict[str, int] = Field(description="reported transactions by what their drop-code means")
    by_call_state: list[StateCount]
    by_drop_code: list[CodeCount]
    outcomes: list[OutcomeCount]
    talk: ShownDurations
    transfers: ShownDurations
    attempts: list[AttemptCount]
    pressed: int = Field(description="in how many calls keys were pressed")
    key_presses: dict[str, int] = Field(
        description="presses by key; masked: rounded down to fives", examples=[{"1": 17, "#": 2}]
    )
    updates_by_minute: list[MinuteCount]
    senders: list[SenderCount]


class ListedTransaction(BaseModel):
    """A transaction in a list; beside these names stand the contract's fields that were given."""

    model_config = ConfigDict(
        json_schema_extra={"additionalProperties": {"type": "string", "description": "a field by its wire name"}}
    )

    transaction_id: str = Field(alias="transaction-id", examples=["demo-001"])
    inconsistent: bool = Field(description="whether call-state and drop-code contradict each other")
    finished: bool = Field(description="whether what was reported says how the call ended")
    updates: int = Field(description="how many different updates were recorded")
    registered_at: str = Field(description="RFC 3339, UTC", examples=["2026-01-31T08:00:00.000Z"])
    updated_at: str | None = Field(description="when the last of its updates was recorded")


class ShownTransactions(BaseModel):
    """A page of a list."""

    transactions: list[ListedTransaction]
    next: str | None = Field(description="where the list goes on: the next page's after; null at its end")


class ShownChanges(ShownTransactions):
    """A page of a list that may be of changes."""

    complete_until: str | None = Field(
        description="the instant (RFC 3339, UTC) up to which this walk of the list misses no change, a few seconds ago:"
        " the updated-since of the next walk; null on the pages after the first",
        examples=["2026-01-31T08:00:00.000Z"],
    )


class LineFault(BaseModel):
    """What is wrong with a line."""

    line: int = Field(description="its number, from 1", examples=[3])
    reason: str = Field(examples=["not JSON"])


class Loaded(BaseModel):
    """What became of the lines."""

    deployment: str = Field(examples=["spring-2026"])
    loaded: int = Field(description="how many transactions they name that are registered with it now")
    repeated: int = Field(description="how many lines name one of these once more")
    faulty: int = Field(description="how many lines were not loaded")
    faults: list[LineFault] = Field(description="the first 100 of those")


class ShownReceipt(BaseModel):
    """What is on disk of a transaction."""

    transaction_id: str = Field(alias="transaction-id", examples=["demo-001"])
    registered: bool
    updates: int = Field(description="how many different updates are held", examples=[3])
    held: bool = Field(description="whether the update of that digest is on disk; without one, whether any is")


class ShownReceipts(BaseModel):
    """A receipt for each that was asked for, in order."""

    receipts: list[ShownReceipt]


class ShownUser(BaseModel):
    """What became of an API user's calls."""

    api_user: str = Field(description="its name, or its API key id where it is deleted")
    recorded: int = Field(description="updates that were recorded")
    repeated: int = Field(description="repeats of what was there already")
    stale: int = Field(description="of those recorded, those that were not the newest of their transaction")
    refused: dict[str, int] = Field(description="other answers, by their code", examples=[{"1002": 7, "1010": 1}])


class ShownUsers(BaseModel):
    """The API users that called, by name."""

    users: list[ShownUser]
