"""Deployments: campaign runs, as the platform makes them, finds them and lists them.

Called by the command line and over HTTP. How a deployment gets its transactions: `voicetx.campaigns.registration`.
Source: docs/contract.md, section 5.
"""

import time
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from voicetx.contract.ids import ID_RULE, is_id, is_step
from voicetx.counting import tallies
from voicetx.storage.schema import deployment


class DeploymentError(Exception):
    """What was asked of a deployment cannot be done; the text says why, in a sentence for whoever asked."""


class DeploymentTaken(DeploymentError):  # noqa: N818 - what is the matter with the id
    """There is a deployment of that id already."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A campaign run: how many transactions it has, and how many of them have an update."""

    deployment_id: str
    name: str
    created_at_ms: int
    transactions: int
    reported: int


def create_deployment(connection: Connection, deployment_id: str, name: str | None) -> None:
    """Make a deployment; raises `DeploymentError` for a malformed id or name, `DeploymentTaken` for an id in use."""
    if not is_id(deployment_id):
        raise DeploymentError(f"A deployment id has {ID_RULE}.")
    if is_step(deployment_id):
        raise DeploymentError(f"A deployment id is not {deployment_id}: in an address that is a step, and no name.")
    if name is not None and not is_name(name.strip()):
        raise DeploymentError("A deployment's name has 1 to 256 printable characters.")
    if is_there(connection, deployment_id):
        raise DeploymentTaken(f"There is a deployment {deployment_id} already.")
    connection.execute(
        insert(deployment).values(
            deployment_id=deployment_id,
            name=name.strip() if name is not None else deployment_id,
            created_at_ms=time.time_ns() // 1_000_000,
        )
    )


def is_name(text: str) -> bool:
    """Say whether a deployment may have this name; control characters are refused, for they steer a terminal."""
    return 1 <= len(text) <= 256 and text.isprintable()  # noqa: PLR2004 - the column's length


def find_deployment(connection: Connection, deployment_id: str) -> Deployment:
    """Return a deployment with its counts; raises `DeploymentError` where there is no such deployment."""
    for found in list_deployments(connection, deployment_id):
        return found
    raise _refuse(deployment_id)


def require_deployment(connection: Connection, deployment_id: str) -> None:
    """Raise `DeploymentError` where there is no such deployment; reads no counts, as `find_deployment` does."""
    if not is_there(connection, deployment_id):
        raise _refuse(deployment_id)


def is_there(connection: Connection, deployment_id: str) -> bool:
    """Say whether there is such a deployment."""
    found = connection.execute(select(deployment.c.deployment_id).where(deployment.c.deployment_id == deployment_id))
    return found.first() is not None


def _refuse(deployment_id: str) -> DeploymentError:
    return DeploymentError(f"There is no deployment {deployment_id}. Make it with: voicetx deployment create")


def list_deployments(connection: Connection, only: str | None = None) -> list[Deployment]:
    """Return the deployments, oldest first, with their counts; with `only` that one, if it is there."""
    wanted = select(deployment).order_by(deployment.c.created_at_ms, deployment.c.deployment_id)
    if only is not None:
        wanted = wanted.where(deployment.c.deployment_id == only)
    counts = tallies.read_registered(connection, only)
    return [
        Deployment(row.deployment_id, row.name, row.created_at_ms, *counts.get(row.deployment_id, (0, 0)))
        for row in connection.execute(wanted)
    ]
