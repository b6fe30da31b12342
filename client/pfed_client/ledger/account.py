"""What one client's images have cost, and what is paid for next: its own ledger beside those that share images with it.

An event counts for a set of images if it was reserved in the ledger of a set that has one image in common with it: each
image then has what it took part in, in whatever company. Rows are added under the lock of the whole shelf, after
everything has been read again, so that no two clients spend the same budget.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pfed_client.ledger.rows import Chain, Committed, Countersigned, Reserved, Row
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
    others: dict[str, Ledger]

    @property
    def chains(self) -> Sequence[Chain]:
        """The own one first."""
        own = [] if self.own is None else [self.own.chain]
        return [*own, *(ledger.chain for ledger in self.others.values())]

    @property
    def events(self) -> list[Event]:
        """All that counts."""
        return [event for chain in self.chains for event in chain.events]


class Account:
    """Of a client in a federation, and of the images with these SHA-256. Methods may be called from any thread."""

    def __init__(self, folder: Path, digests: Collection[bytes], *, federation: str, client: str) -> None:
        self._shelf = Shelf(folder)
        self._digests = frozenset(digests)
        self._federation = federation
        self._client = client
        self._seen: int | None = None

    @property
    def folder(self) -> Path:
        """Of all ledgers."""
        return self._shelf.folder

    def read(self) -> Statement:
        """What is on disk now. Raises LedgerError unless all of it is as it was written, and nothing is missing."""
        own, others = self._shelf.concerning(self._digests)
        statement = Statement(own, others)
        together = dict(others) if own is None else others | {own.name: own}
        for ledger in together.values():
            _check_signatures(self._shelf.folder / ledger.name, ledger.chain)
            for row in ledger.chain.rows:
                for name, head in row.beside.items() if isinstance(row, Reserved) else ():
                    beside = together.get(name)
                    gone = beside is None and ledger is own
                    if gone or (beside is not None and beside.chain.position(head) is None):
                        raise LedgerError(
                            f"{self._shelf.folder / name}: gone, or an older copy than the one that was there when "
                            f"{ledger.name}, which shares images with it, was last added to; restore the newest copy"
                        )
        return statement

    @contextmanager
    def held(self) -> Iterator[None]:
        """This process alone takes part with these images; their ledger is made. Raises LedgerError, StateLocked."""
        with self._shelf.locked():
            ledger = self.read().own or self._shelf.open(self._digests)
        with self._shelf.held(ledger.name):
            yield

    def server_has(self, head: str) -> int:
        """Note how far the server knows the ledger; returns the number that it last gave for this client, 0 for none.

        Raises LedgerError for a head that is not in it.
        """
        own = self.read().own
        position = -1 if not head else None if own is None else own.chain.position(head)
        if position is None:
            name = self._shelf.folder if own is None else self._shelf.folder / own.name
            raise LedgerError(
                f"{name}: the server knows a row of {self._client}'s ledger (head {head[:12]}) that is not in it: "
                "it is an older copy, was changed or made anew, or is of other images; restore the newest copy: "
                "without it what these images have spent cannot be known, and nothing more is released"
            )
        self._seen = position
        rows = [] if own is None else own.chain.rows
        return max((row.number for row in rows if isinstance(row, Countersigned) and self._mine(row)), default=0)

    def reserve(self, event: Event, allow: Allow) -> str:
        """Pay for `event`; the head of the row that says so, on disk on return.

        A row of the same event is taken again where nothing can have been made of it: one that the server has not seen
        when it was last asked, and that it did not countersign. Whatever `allow` raises comes through, and then nothing
        was paid. Raises LedgerError.
        """
        with self._shelf.locked():
            statement = self.read()
            if (head := self._unused(statement.own, event)) is not None:
                return head
            allow([*statement.events, event])
            own = statement.own or self._shelf.open(self._digests)
            beside = {name: ledger.chain.head for name, ledger in statement.others.items()}
            row = Reserved(federation=self._federation, client=self._client, event=event, beside=beside)
            return self._shelf.append(own, row)

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

    def _append(self, row: Countersigned | Committed) -> None:
        with self._shelf.locked():
            own = self.read().own
            named = row.head if isinstance(row, Countersigned) else row.reservation
            if own is None or own.chain.position(named) is None:
                raise LedgerError(
                    f"{self._shelf.folder}: the ledger of these images was replaced while it was in use; restore the "
                    "newest copy, and leave it to one client"
                )
            self._shelf.append(own, row)

    def _unused(self, own: Ledger | None, event: Event) -> str | None:
        if own is None or self._seen is None:
            return None
        rows = own.chain.rows
        newest = max((at for at, row in enumerate(rows) if isinstance(row, Reserved)), default=-1)
        if newest <= self._seen or any(isinstance(row, Countersigned) for row in rows[newest:]):
            return None
        row = rows[newest]
        assert isinstance(row, Reserved)
        return own.chain.heads[newest] if row.event == event and self._mine(row) else None

    def _mine(self, row: Row) -> bool:
        if not isinstance(row, Reserved | Countersigned):
            return False
        return (row.federation, row.client) == (self._federation, self._client)


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
