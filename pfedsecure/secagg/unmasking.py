"""From masked inputs and shares to the weighted mean: the server's last step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import dealing, keys, shamir
from pfedsecure.secagg.dealing import Kind
from pfedsecure.secagg.encoding import WeightedMean
from pfedsecure.secagg.masking import Masks, Ring, pair_info, self_info
from pfedsecure.secagg.server import ServerRound


class RoundLost(MessageRejected):
    """A round whose sum cannot be had. `culprits`: clients that broke the rules, where that can be told."""

    def __init__(self, message: str, culprits: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.culprits = culprits


@dataclass(frozen=True)
class Outcome:
    """`survivors` are in the mean; `culprits` gave out wrong shares, which did no harm."""

    mean: WeightedMean
    survivors: tuple[str, ...]
    culprits: tuple[str, ...]


def result(server: ServerRound) -> Outcome:
    """The outcome of a round all of whose steps are closed.

    Every secret that was put together is compared with what its owner advertised, so the sum is right or there is
    none: raises RoundLost when too few shares of somebody arrived, when a dealer's shares are not of its secrets, and
    when masks do not cancel, as they do not for clients that were shown different models or that broke the rules.
    """
    secrets, liars = _secrets(server)
    total = unmasked_sum(server, secrets)
    mean = server.encoding.decode(total, int(server.survivors.sum()))
    if mean is None:
        raise RoundLost(
            f"the masks of round {server.setting.round} do not cancel: some client was shown another model or broke "
            "the rules; nothing can be told from the sum"
        )
    survivors = tuple(server.names[client] for client in np.flatnonzero(server.survivors))
    return Outcome(mean, survivors, tuple(sorted(liars)))


def unmasked_sum(server: ServerRound, secrets: dict[int, bytes]) -> Ring:
    """The sum of the survivors' vectors, given each survivor's seed and each other participant's private mask key."""
    total = np.zeros(server.encoding.length, server.encoding.dtype)
    masks = Masks(server.encoding.length, server.encoding.dtype)
    digest = server.participants_digest
    for survivor in np.flatnonzero(server.survivors).tolist():
        np.add(total, server.masked_input(survivor), out=total)
        masks.subtract(total, keys.derive(secrets[survivor], self_info(digest, survivor)))
    partners = server.holds | server.holds.T
    for dropped in np.flatnonzero(server.participants & ~server.survivors).tolist():
        agreement = keys.Agreement(secrets[dropped])
        for survivor in np.flatnonzero(partners[dropped] & server.survivors).tolist():
            secret = agreement.secret(server.advertisements[survivor].mask_key, server.names[survivor])
            key = keys.derive(secret, pair_info(digest, survivor, dropped))
            (masks.subtract if survivor < dropped else masks.add)(total, key)
    return total


def _secrets(server: ServerRound) -> tuple[dict[int, bytes], set[str]]:
    """The verified secret of every participant, and the clients that gave out wrong shares."""
    lacking = np.flatnonzero(~server.recoverable())
    if len(lacking):
        raise RoundLost(f"too few shares of {server.names[int(lacking[0])]} arrived to unmask the sum")
    shares = _Revealed(server)
    participants = np.flatnonzero(server.participants)
    helpers = np.stack([shares.helpers(dealer)[: server.sharing.threshold] for dealer in participants.tolist()])
    found = _reconstruct(helpers + 1, shares.of(participants[:, None], helpers))
    secrets: dict[int, bytes] = {}
    liars: set[str] = set()
    for dealer, secret in zip(participants.tolist(), found, strict=True):
        if secret is None or not _is_advertised(server, dealer, secret):
            secret = _without_liars(server, shares, dealer, liars)
        secrets[dealer] = secret
    return secrets, liars


class _Revealed:
    """All shares that were given out, in one array."""

    def __init__(self, server: ServerRound) -> None:
        self._holds = server.holds & server.helpers
        order = np.flatnonzero(server.helpers)
        self._shares = np.concatenate([shamir.from_bytes(server.unmasking(helper)) for helper in order.tolist()])
        counts = self._holds.sum(axis=0)
        self._start = np.cumsum(counts) - counts
        self._rank = np.cumsum(self._holds, axis=0, dtype=np.int32) - 1

    def helpers(self, dealer: int) -> NDArray[np.int64]:
        """Who gave out a share of this dealer."""
        return np.flatnonzero(self._holds[dealer])

    def of(self, dealers: NDArray[np.int64], helpers: NDArray[np.int64]) -> shamir.Shares:
        """The shares, for index arrays that are broadcast against each other."""
        shares: shamir.Shares = self._shares[self._start[helpers] + self._rank[dealers, helpers]]
        return shares


def _reconstruct(points: NDArray[np.int64], shares: shamir.Shares) -> list[bytes | None]:
    return shamir.reconstruct(points, shares)


def _kind(server: ServerRound, dealer: int) -> Kind:
    return Kind.SEED if server.survivors[dealer] else Kind.MASK_KEY


def _is_advertised(server: ServerRound, dealer: int, secret: bytes) -> bool:
    """Whether a secret is the one that its owner signed for."""
    advertisement = server.advertisements[dealer]
    if _kind(server, dealer) is Kind.SEED:
        return dealing.commit_seed(server.setting.digest, secret) == advertisement.seed_commitment
    return keys.public_key(secret) == advertisement.mask_key


def _without_liars(server: ServerRound, shares: _Revealed, dealer: int, liars: set[str]) -> bytes:
    """The dealer's secret from the shares that are as committed; the other helpers join `liars`. Raises RoundLost."""
    honest = []
    for helper in shares.helpers(dealer).tolist():
        share = shamir.to_bytes(shares.of(np.array([dealer]), np.array([helper])))
        kind = _kind(server, dealer)
        committed = dealing.commitment_of(server.commitments(dealer, helper), kind)
        if dealing.commit_share(server.roster_digest, dealer, helper, kind, share) == committed:
            honest.append(helper)
        else:
            liars.add(server.names[helper])
    name = server.names[dealer]
    if len(honest) < server.sharing.threshold:
        raise RoundLost(
            f"too few right shares of {name} arrived; wrong ones came from {', '.join(sorted(liars))}",
            tuple(sorted(liars)),
        )
    helpers = np.array(honest[: server.sharing.threshold])
    (secret,) = _reconstruct(helpers[None] + 1, shares.of(np.array([[dealer]]), helpers[None]))
    if secret is None or not _is_advertised(server, dealer, secret):
        raise RoundLost(f"the shares that {name} dealt are not of the secrets that it advertised", (name,))
    return secret
