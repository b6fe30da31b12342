"""Who is which member: a name is bound to the key that it first came with, and a membership to one certificate."""

from __future__ import annotations

from collections.abc import Collection

from pfed_server.store import Member, State
from pfedsecure.errors import MessageRejected, NameTaken, NotAMember
from pfedsecure.wire.peer import Peer, require_role

MAX_INSTANCE_ID_CHARS = 64


def member_of(peer: Peer, instance_id: str, expert_id: str) -> Member:
    """The membership of `peer` as of now, taking part."""
    serial = "" if peer.serial is None else f"{peer.serial:x}"
    not_after = 0.0 if peer.not_after is None else peer.not_after.timestamp()
    return Member(peer.name, peer.fingerprint, instance_id, expert_id, True, serial, not_after)


def current_member(state: State, peer: Peer, instance_id: str | None = None) -> Member:
    """The membership of a caller that takes part; `instance_id`: of its process, None for calls that do not tell.

    Raises IdentityError for another role than a client's, NotAMember, or NameTaken for another key or another process.
    """
    member = _by_name(state, peer)
    if not member.taking_part:
        raise _not_a_member(peer)
    _check_key(member, peer)
    _check_process(member, instance_id)
    return member


def leaving_member(state: State, peer: Peer, instance_id: str) -> Member:
    """The membership that a caller gives up, or gave up before. Raises as `current_member`.

    It may have renewed its certificate since it was last here.
    """
    member = _by_name(state, peer)
    check_may_have_name(member, peer)
    if member.taking_part:
        _check_process(member, instance_id)
    return member


def _by_name(state: State, peer: Peer) -> Member:
    require_role(peer, "client")
    member = state.members.get(peer.name)
    if member is None:
        raise _not_a_member(peer)
    return member


def _not_a_member(peer: Peer) -> NotAMember:
    return NotAMember(f"{peer.name} does not take part in this federation; join it first")


def _check_process(member: Member, instance_id: str | None) -> None:
    if instance_id not in (None, member.instance_id):
        raise NameTaken(f"another process has joined as {member.name} meanwhile; stop one of the two")


def _check_key(member: Member, peer: Peer) -> None:
    """Raise NameTaken unless `peer` has the key that its name is bound to."""
    if member.fingerprint != peer.fingerprint:
        raise NameTaken(
            f"the name {member.name} belongs to a client with another key in this federation; use that key, or have "
            "a certificate approved under another name"
        )


def check_may_have_name(member: Member, peer: Peer) -> None:
    """Raise NameTaken unless `peer` has the key that its name is bound to, or one that succeeds it."""
    if member.fingerprint not in peer.succeeds:
        _check_key(member, peer)


def check_instance_id(instance_id: str) -> None:
    """Raise MessageRejected unless `instance_id` can be one."""
    if not 1 <= len(instance_id) <= MAX_INSTANCE_ID_CHARS:
        raise MessageRejected(f"an instance_id has 1 to {MAX_INSTANCE_ID_CHARS} characters, not {len(instance_id)}")


def revoked_members(state: State, serials: Collection[int]) -> list[str]:
    """Who joined with a certificate of these serial numbers and still takes part or lends something, sorted."""
    revoked = (member for member in state.members.values() if member.serial and int(member.serial, 16) in serials)
    return sorted(member.name for member in revoked if member.taking_part or member.name in state.pooled)
