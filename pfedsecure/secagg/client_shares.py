"""A client's part with shares: it deals its own and takes in those of others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import dealing, keys, messages, shamir
from pfedsecure.secagg.cohort import Cohort
from pfedsecure.secagg.entropy import Entropy
from pfedsecure.wire.v1 import secagg_pb2 as wire


def deal(state: wire.ClientRoundState, cohort: Cohort, entropy: Entropy) -> bytes:
    """Share seed and mask key among holders drawn now; the message of step SHARE. The own shares go into `state`."""
    holders = cohort.sharing.draw_holders(cohort.own, entropy)
    points = np.append(holders, cohort.own) + 1
    shares = shamir.share([state.seed, state.mask_key], points, cohort.sharing.threshold, entropy)
    dealt = [shamir.to_bytes(shares[row]) for row in range(len(points))]
    committed = [
        dealing.commit_record(cohort.roster.digest, cohort.own, int(point) - 1, record)
        for point, record in zip(points, dealt, strict=True)
    ]
    agreement = keys.Agreement(state.share_key)
    sealed = []
    for holder, record, commitments in zip(holders.tolist(), dealt[:-1], committed[:-1], strict=True):
        secret = cohort.share_secret(agreement, holder)
        sealed.append(
            dealing.seal_record(secret, cohort.roster.digest, cohort.own, holder, record, commitments, entropy)
        )
    state.holders[:] = holders.tolist()
    state.dealers[:] = [cohort.own]
    state.shares = dealt[-1]
    return messages.serialised(
        wire.Shares(
            holders=holders.tolist(),
            sealed=b"".join(sealed),
            commitments=b"".join(committed[:-1]),
            own_commitments=committed[-1],
        )
    )


def take_in(state: wire.ClientRoundState, cohort: Cohort, inbox: wire.Inbox, dealers: NDArray[np.int64]) -> None:
    """Unseal the shares of `dealers` into `state`. Raises MessageRejected naming a dealer whose share is not right."""
    sealed = messages.records(inbox.sealed, dealing.SEALED_BYTES, len(dealers), "the inbox's sealed shares")
    committed = messages.records(inbox.commitments, dealing.COMMITMENTS_BYTES, len(dealers), "the inbox's commitments")
    agreement = keys.Agreement(state.share_key)
    held = {cohort.own: state.shares}
    for dealer, box, commitments in zip(dealers.tolist(), sealed, committed, strict=True):
        secret = cohort.share_secret(agreement, dealer)
        record = dealing.unseal_record(secret, cohort.roster.digest, dealer, cohort.own, box, commitments)
        if record is None:
            raise MessageRejected(
                f"the share from {cohort.roster.members[dealer].name} is not what it committed to, or was changed "
                "on the way; nothing was sent"
            )
        held[dealer] = record
    state.dealers[:] = sorted(held)
    state.shares = b"".join(held[dealer] for dealer in sorted(held))
