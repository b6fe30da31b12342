"""What `pfed-client leave` does: the federation goes on without this client, and its state never joins again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pfed_client.agreement import agree
from pfed_client.grpc_api import GrpcApi
from pfed_client.saved import SavedClient
from pfed_client.state import ClientState
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError
from pfedsecure.pki.identity import Identity
from pfedsecure.wire.loopback import require_loopback
from pfedsecure.wire.v1 import federation_pb2 as fed


def leave(
    client: SavedClient, servers: tuple[Address, ...], folder: Path | None, *, insecure: bool, retry_seconds: float
) -> None:
    """Have `client` leave its federation at one of `servers`; on return it has said that it did. Repeating is harmless.

    `folder`: its identity, by default the one inside its state. Raises StateLocked while it takes part,
    ServerUnreachable, IdentityError, and StateError when the server runs another federation; it has not left then.
    """
    if insecure:
        for address in servers:
            require_loopback(address.host)
    with ClientState(client.folder) as state:
        identity = None if insecure else Identity.load(folder or client.folder / "identity", role="client")
        if identity is not None and identity.subject.name != client.name:
            raise IdentityError(
                f"{identity.folder} is the identity of {identity.subject.name}, not of {client.name}: give --identity"
            )
        asyncio.run(_leave(state, servers, identity, retry_seconds))
        state.leave()


async def _leave(
    state: ClientState, servers: tuple[Address, ...], identity: Identity | None, retry_seconds: float
) -> None:
    server, *others = servers
    name = state.record.name
    async with GrpcApi(server, identity, others=others, claimed_name=name, retry_seconds=retry_seconds) as api:
        await agree(api, state)
        await api.leave(fed.LeaveRequest(instance_id=state.record.instance_id))
