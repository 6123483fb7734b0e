"""The table of answers: every way in which a request is refused, and the one exception for it.

Any step of handling an update may raise `Rejected`; only `voicetx.api.answers` turns it into bytes. This module is the
table of contract section 3 and nothing else.

    Exception
     +-- Rejected       a refusal that the contract has a code for
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one field; `reason` never quotes the value that was sent."""

    field: str
    reason: str


class Refusal(Enum):
    """Each code of contract section 3 with its HTTP status and its description, verbatim.

    The last rows, from NOT_FOUND on, are not in the user's table. They use its shape, with the HTTP status as the code.
    """

    NOT_PROCESSED = (200, 1010, "The request was not processed.")
    NOT_GRANTED = (
        401,
        430,
        "Authorization failed. This resource is not allowed to access using this TOKEN or KEY",
    )
    NOT_SIGNED_IN = (401, 498, "Invalid token or Access token expired")
    METHOD_NOT_SUPPORTED = (405, 405, "Method not supported")
    THROTTLED = (429, 429, "Too many requests. Throttle limit reached for the time window.")
    BAD_VALUE = (
        499,
        499,
        "Request failed. Check the exact reason of failure in application code and description of error stream.",
    )
    INTERNAL = (500, 500, "Internal server error")
    INVALID_JSON = (500, 1001, "Invalid input JSON")
    FIELD_MISSING = (500, 1002, "Mandatory field missing")
    NOT_FOUND = (404, 404, "Not found")
    MALFORMED_REQUEST = (400, 400, "Malformed HTTP request")
    BODY_TOO_SLOW = (408, 408, "Request body not received in time")
    BODY_TOO_LARGE = (413, 413, "Request body too large")
    ENCODING_NOT_SUPPORTED = (415, 415, "Content encoding not supported")
    HEAD_TOO_LARGE = (431, 431, "Request head too large")

    def __init__(self, status: int, code: int, description: str) -> None:
        self.status = status
        self.code = code
        self.description = description


class Challenge(Enum):
    """What is wrong with a credential: the error of RFC 6750, section 3.1, and a sentence.

    A request without a credential gets no error (same section). The sentences must not hold quotes or backslashes
    (section 3).
    """

    NO_HEADER = (None, "There is no authorization header.")
    EMPTY = ("invalid_request", "The authorization header is empty, or there are several.")
    OTHER_SCHEME = ("invalid_request", "The authorization header does not begin with Bearer and a space.")
    MALFORMED = ("invalid_request", "What follows Bearer is no credential: it is empty or has other characters.")
    UNKNOWN = ("invalid_token", "The credential is unknown or revoked.")
    EXPIRED = ("invalid_token", "The access token has expired.")
    NOT_GRANTED = ("insufficient_scope", "The API user lacks the grant for this.")

    def __init__(self, error: str | None, description: str) -> None:
        self.error = error
        self.description = description


class Rejected(Exception):  # noqa: N818 - it names what happened to the request, not a defect
    """A refusal: which row of the table, the fields at fault in body order, and when a retry can help.

    `retry_after_seconds` is a whole number of seconds, or None if a retry alone would change nothing.
    `challenge` says what is wrong with the credential.
    """

    def __init__(
        self,
        refusal: Refusal,
        faults: Sequence[Fault] = (),
        *,
        retry_after_seconds: int | None = None,
        challenge: Challenge | None = None,
    ) -> None:
        super().__init__(refusal.description)
        self.refusal = refusal
        self.faults = tuple(faults)
        self.retry_after_seconds = retry_after_seconds
        self.challenge = challenge
