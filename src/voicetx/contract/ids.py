"""Transaction and deployment ids: what they may look like, wherever one comes in.

Transactions and deployments keep to the same rule. Pure; a database, a path or a file may bring the text. Source:
docs/contract.md, section 2.
"""

import re
from typing import Annotated

from pydantic import Field

ID_RULE = "1 to 128 visible ASCII characters"
"""The rule in words, as refusals and documents say it."""

_PATTERN = r"[\x21-\x7e]{1,128}"
_ID = re.compile(_PATTERN)

TransactionId = Annotated[str, Field(description=ID_RULE, examples=["demo-001"], pattern=f"^{_PATTERN}$")]
"""The type of a transaction's id in a model, which refuses what is none."""


def is_id(text: str) -> bool:
    """Say whether a transaction or a deployment may have this id."""
    return _ID.fullmatch(text) is not None


def is_step(text: str) -> bool:
    """Say whether clients remove this from a path, escaped or not (RFC 3986, 5.2.4), so that nobody can ask for it."""
    return text in {".", ".."}
