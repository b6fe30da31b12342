"""Who is which member: a name is bound to the key that it first came with, and a membership to one certificate."""

from __future__ import annotations

from collections.abc import Collection

from pfed_server.store import Member, State
from pfedsecure.errors import MessageRejected, NameTaken
from pfedsecure.wire.peer import Peer

MAX_INSTANCE_ID_CHARS = 64


def member_of(peer: Peer, instance_id: str, expert_id: str) -> Member:
    """The membership of `peer` as of now, taking part."""
    serial = "" if peer.serial is None else f"{peer.serial:x}"
    not_after = 0.0 if peer.not_after is None else peer.not_after.timestamp()
    return Member(peer.name, peer.fingerprint, instance_id, expert_id, True, serial, not_after)


def check_key(member: Member, peer: Peer) -> None:
    """Raise NameTaken unless `peer` has the key that its name is bound to."""
    if member.fingerprint != peer.fingerprint:
        raise NameTaken(
            f"the name {member.name} belongs to a client with another key in this federation; use that key, or have "
            "a certificate approved under another name"
        )


def check_may_have_name(member: Member, peer: Peer) -> None:
    """As `check_key`, for a caller that joins: its key may also be one that succeeds the one that is known."""
    if member.fingerprint not in peer.succeeds:
        check_key(member, peer)


def check_instance_id(instance_id: str) -> None:
    """Raise MessageRejected unless `instance_id` can be one."""
    if not 1 <= len(instance_id) <= MAX_INSTANCE_ID_CHARS:
        raise MessageRejected(f"an instance_id has 1 to {MAX_INSTANCE_ID_CHARS} characters, not {len(instance_id)}")


def revoked_members(state: State, serials: Collection[int]) -> list[str]:
    """Who joined with a certificate of these serial numbers and still takes part or lends something, sorted."""
    revoked = (member for member in state.members.values() if member.serial and int(member.serial, 16) in serials)
    return sorted(member.name for member in revoked if member.taking_part or member.name in state.pooled)
