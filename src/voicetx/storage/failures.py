"""What went wrong with a database, as far as it decides whether to try again or give up.

`voicetx.storage.sqlite` and `voicetx.storage.postgresql` derive it from their drivers' errors;
`voicetx.storage.store` acts on it.
"""

from enum import Enum
from typing import NamedTuple


class Cause(Enum):
    """What an error of a database means; it is unknown whether any of the work was written."""

    CONFLICT = "two transactions were in each other's way: the work may run again at once"
    LOST = "the connection was lost, and another one may be had"
    VALUE = "the database is well and refuses a value of the work"
    MISSING = "there is no such database file"
    UNFIT = "the database, or what is in between, won't do as it is"
    AWAY = "the database can't be reached, or can't do its work now"


class Failure(NamedTuple):
    """The cause, and a text for whoever runs the service, which quotes nothing that a dialer sent."""

    cause: Cause
    text: str


def describe(error: BaseException) -> str:
    """Name an error without its text, which may quote what a dialer sent."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    state = getattr(error, "sqlstate", None)
    name = type(error.__cause__ or error).__name__
    return f"{name} ({state})" if state else name
