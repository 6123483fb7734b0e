"""Who sends a request, and whether they may: the one place where a request without a grant is refused.

Every endpoint requires its grant here, and so do the dashboard and the fast path of updates.
"""

from starlette.types import Scope

from voicetx.access.users import ApiUser, Grant
from voicetx.contract.refusals import Challenge, Refusal, Rejected
from voicetx.services import Services


async def sign_in(services: Services, scope: Scope) -> ApiUser:
    """Return the API user that the request's `authorization` header names; raises as `Authenticator` does."""
    return await services.authenticator.authenticate(find_authorization(scope), client_address(scope))


def find_authorization(scope: Scope) -> bytes | None:
    """Return the `authorization` field; if there are several, an empty one, which signs nobody in.

    With several, a proxy in front may have checked another one than we would.
    """
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    return (bytes(found[0]) if len(found) == 1 else b"") if found else None


def require_grant(user: ApiUser, *grants: Grant) -> None:
    """Raise `Rejected` (430) unless the user holds one of the grants."""
    if user.grants.isdisjoint(grants):
        raise Rejected(Refusal.NOT_GRANTED, challenge=Challenge.NOT_GRANTED)


def client_address(scope: Scope) -> str:
    """Return the client's address, as trusted proxies report it; empty if the server knows none."""
    client = scope.get("client")
    return str(client[0]) if client else ""
