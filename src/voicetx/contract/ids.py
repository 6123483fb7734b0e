"""Transaction and deployment ids: what they may look like, whether one comes from a request, a file or the database.

Transactions and deployments follow the same rule. Pure. Source: docs/contract.md, section 2.
"""

import re
from typing import Annotated

from pydantic import Field

ID_RULE = "1 to 128 visible ASCII characters"
"""The rule in words, used by refusals and documents."""

_PATTERN = r"[\x21-\x7e]{1,128}"
_ID = re.compile(_PATTERN)

TransactionId = Annotated[str, Field(description=ID_RULE, examples=["demo-001"], pattern=f"^{_PATTERN}$")]
"""The type of a transaction's id in pydantic models, which refuse anything else."""


def is_id(text: str) -> bool:
    """Say whether a transaction or a deployment may have this id."""
    return _ID.fullmatch(text) is not None


def is_step(text: str) -> bool:
    """Say whether an id is `.` or `..`: clients remove these from paths, escaped or not (RFC 3986, section 5.2.4).

    No request can ask for such an id.
    """
    return text in {".", ".."}
