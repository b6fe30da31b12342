"""What one client's images have cost, and what is paid for next: its own ledger beside those that share images with it.

An event counts for a set of images if it was reserved in the ledger of a set that has one image in common with it: each
image then has what it took part in, in whatever company. Rows are added under the lock of the whole shelf, after
everything has been read again, so that no two clients spend the same budget. Ledgers that share images remember each
other's heads, and an account the last row that it wrote or was told of, so that none of them disappears unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pfed_client.ledger.rows import Chain, Committed, Countersigned, Noted, Promised, Reserved, Resumed, Row
from pfed_client.ledger.shelf import LEDGER_FILE, Ledger, Shelf
from pfedsecure.errors import IdentityError, LedgerError
from pfedsecure.pki.countersignature import Countersignature, LedgerHead, verify_countersignature
from pfedsecure.privacy.events import Event

Allow = Callable[[list[Event]], None]
"""Raises to forbid what the last of all these events would be."""


@dataclass(frozen=True)
class Statement:
    """What is on disk: the own ledger, None before there is one, and those that share images with it, by name."""

    own: Ledger | None
    others: Mapping[str, Ledger]

    @property
    def chains(self) -> Sequence[Chain]:
        """The own one first."""
        own = [] if self.own is None else [self.own.chain]
        return [*own, *(ledger.chain for ledger in self.others.values())]

    @property
    def events(self) -> list[Event]:
        """All that counts."""
        return [event for chain in self.chains for event in chain.events]

    @property
    def promises(self) -> list[Promised]:
        """All that were made of some of these images."""
        return [row for chain in self.chains for row in chain.rows if isinstance(row, Promised)]


class Account:
    """Of a client in a federation, and of the images with these SHA-256. Methods may be called from any thread."""

    def __init__(self, folder: Path, digests: Collection[bytes], *, federation: str, client: str) -> None:
        self._shelf = Shelf(folder)
        self._digests = frozenset(digests)
        self._federation = federation
        self._client = client
        self._seen: int | None = None
        self._newest = ""
        self._paid = ""

    @property
    def folder(self) -> Path:
        """Of all ledgers."""
        return self._shelf.folder

    @property
    def paid(self) -> str:
        """The head of the row that `reserve` wrote last; empty before that."""
        return self._paid

    def read(self) -> Statement:
        """What is on disk now. Raises LedgerError unless all of it is as it was written, and nothing is missing."""
        if not self._shelf.exists():
            return self._checked(Statement(None, {}))
        with self._shelf.locked():
            return self._read()

    def expect(self, head: str) -> Statement:
        """`read`, where the row with this head must be. From now on it must be there whenever anything is read."""
        self._newest = self._newest or head
        return self.read()

    @contextmanager
    def held(self) -> Iterator[None]:
        """This process alone takes part with these images; their ledger is made. Raises LedgerError, StateLocked."""
        with self._shelf.locked():
            ledger = self._read().own or self._shelf.open(self._digests)
        with self._shelf.held(ledger.name):
            yield

    def server_has(self, head: str) -> int:
        """Note how far the server knows the ledger; returns the number that it last gave for this client, 0 for none.

        Raises LedgerError for a head that is not of a row in it with which this client paid: that others, say with the
        same images, have such a row must not be seen from here.
        """
        own = self.read().own
        rows = [] if own is None else own.chain.rows
        position = -1 if not head else None if own is None else own.chain.position(head)
        paid = position is not None and (position < 0 or (_pays(rows[position]) and self._mine(rows[position])))
        if position is None or not paid:
            name = self._shelf.folder if own is None else self._shelf.folder / own.name
            raise LedgerError(
                f"{name}: the server knows a row of {self._client}'s ledger (head {head[:12]}) that is not in it: "
                "it is an older copy, was changed or made anew, or is of other images; restore the newest copy: "
                "without it what these images have spent cannot be known, and nothing more is released"
            )
        self._seen = position
        return max((row.number for row in rows if isinstance(row, Countersigned) and self._mine(row)), default=0)

    def promise(self, epsilon: float, delta: float) -> str:
        """Write down a promise; the head of the row that says so. Raises LedgerError."""
        return self._append(Promised(federation=self._federation, client=self._client, epsilon=epsilon, delta=delta))

    def reserve(self, event: Event, allow: Allow) -> str:
        """Pay for `event`; the head of the row that reserves it, on disk on return.

        A reservation of the same event is resumed where nothing can have been made of it: one that the server had not
        seen when it was last asked, and did not countersign. Whatever `allow` raises comes through, and then nothing
        was paid. Raises LedgerError.
        """
        with self._shelf.locked():
            statement = self._read()
            own = statement.own
            reservation = self._unused(own, event)
            if own is not None and reservation is not None:
                row: Row = Resumed(federation=self._federation, client=self._client, reservation=reservation)
            else:
                allow([*statement.events, event])
                own = own or self._shelf.open(self._digests)
                beside = {name: ledger.chain.head for name, ledger in statement.others.items()}
                row = Reserved(federation=self._federation, client=self._client, event=event, beside=beside)
            written = self._shelf.append(own, row)
            self._newest = self._paid = written.chain.head
            for other in statement.others.values():
                self._shelf.append(other, Noted(ledger=own.name, head=self._paid))
            return reservation or self._paid

    def countersigned(self, head: str, number: int, certificate: bytes, signature: bytes) -> None:
        """Write down that the server knows the ledger up to the row with this head. Raises LedgerError."""
        self._append(
            Countersigned(
                federation=self._federation,
                client=self._client,
                head=head,
                number=number,
                certificate=certificate.hex(),
                signature=signature.hex(),
            )
        )

    def commit(self, reservation: str) -> None:
        """Write down that what was reserved has been made. Raises LedgerError."""
        self._append(Committed(reservation=reservation))

    def _append(self, row: Promised | Countersigned | Committed) -> str:
        with self._shelf.locked():
            own = self._read().own
            if own is None:
                raise LedgerError(f"{self._shelf.folder}: the ledger of these images is gone; restore the newest copy")
            self._newest = self._shelf.append(own, row).chain.head
            return self._newest

    def _read(self) -> Statement:
        """Only while locked."""
        return self._checked(Statement(*self._shelf.concerning(self._digests)))

    def _checked(self, statement: Statement) -> Statement:
        own = statement.own
        if self._newest and (own is None or own.chain.position(self._newest) is None):
            raise LedgerError(
                f"{self._shelf.folder}: what this client released is not in the ledger of its images: that is gone, an "
                "older copy, or in another folder; restore the newest copy, or give the --ledger that it was started "
                "with"
            )
        together = dict(statement.others) if own is None else {**statement.others, own.name: own}
        for ledger in together.values():
            _check_signatures(self._shelf.folder / ledger.name, ledger.chain)
            for name, head in _known_neighbours(ledger.chain):
                beside = together.get(name)
                gone = beside is None and ledger is own
                if gone or (beside is not None and beside.chain.position(head) is None):
                    raise LedgerError(
                        f"{self._shelf.folder / name}: gone, or an older copy than the one that was there when "
                        f"{ledger.name}, which shares images with it, was last added to; restore the newest copy"
                    )
        return statement

    def _unused(self, own: Ledger | None, event: Event) -> str | None:
        """The reservation of `event` that may be resumed."""
        if own is None or self._seen is None:
            return None
        rows, heads = own.chain.rows, own.chain.heads
        newest = max((at for at, row in enumerate(rows) if _pays(row)), default=-1)
        if newest <= self._seen or any(isinstance(row, Countersigned) for row in rows[newest:]):
            return None
        resumed = rows[newest]
        first = own.chain.position(resumed.reservation) if isinstance(resumed, Resumed) else newest
        reserved = None if first is None or first < 0 else rows[first]
        if first is None or not isinstance(reserved, Reserved):
            return None
        return heads[first] if reserved.event == event and self._mine(reserved) and self._mine(resumed) else None

    def _mine(self, row: Row) -> bool:
        if not isinstance(row, Reserved | Resumed | Countersigned):
            return False
        return (row.federation, row.client) == (self._federation, self._client)


def _pays(row: Row) -> bool:
    return isinstance(row, Reserved | Resumed)


def _known_neighbours(chain: Chain) -> Iterator[tuple[str, str]]:
    """Ledgers that share images with this one, and heads that they had."""
    for row in chain.rows:
        if isinstance(row, Reserved):
            yield from row.beside.items()
        elif isinstance(row, Noted):
            yield row.ledger, row.head


def _check_signatures(folder: Path, chain: Chain) -> None:
    """Who makes a chain of his own cannot take servers' signatures along, only leave them out, which servers notice."""
    for position, row in enumerate(chain.rows):
        if not isinstance(row, Countersigned):
            continue
        head = LedgerHead(row.federation, row.client, row.number, bytes.fromhex(row.head))
        made = Countersignature(bytes.fromhex(row.certificate), bytes.fromhex(row.signature))
        try:
            if row.head not in chain.heads[:position]:
                raise IdentityError("it is of no row before it")
            if made.certificate:
                verify_countersignature(made, head, None, row.time)
        except IdentityError as error:
            raise LedgerError(
                f"{folder / LEDGER_FILE}: line {position + 1}, a server's signature, is not good ({error}): the ledger "
                "was changed; restore the newest copy"
            ) from None
