"""Who holds whose shares and who masks with whom, as a function of the size of the cohort alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pfedsecure.secagg.bounds import holders_and_threshold
from pfedsecure.secagg.entropy import Entropy, uniform_subset
from pfedsecure.secagg.setting import Parameters


@dataclass(frozen=True)
class Sharing:
    """The wiring of a cohort of `clients`.

    `quorum`: the fewest that must share, survive, sign and unmask: more than two thirds of the cohort. Any two quorums
    have more than a third of it in common, hence an honest client as long as fewer than a third are corrupt: so no two
    different sets of survivors are both signed by a quorum. `holders`: how many others hold a client's shares; it keeps
    one more itself. `threshold`: how many shares determine a secret.
    """

    clients: int
    quorum: int
    holders: int
    threshold: int

    @classmethod
    def of(cls, parameters: Parameters, clients: int) -> Sharing:
        """The wiring that every party computes for itself."""
        quorum = 2 * clients // 3 + 1
        if clients > parameters.complete_up_to:
            sparse = holders_and_threshold(clients, quorum, parameters.assumptions)
            if sparse is not None:
                return cls(clients, quorum, *sparse)
        return cls(clients, quorum, holders=clients - 1, threshold=quorum)

    @property
    def complete(self) -> bool:
        """Whether everybody holds shares of everybody."""
        return self.holders == self.clients - 1

    def draw_holders(self, own: int, entropy: Entropy) -> NDArray[np.int64]:
        """The holders that client `own` chooses: itself left out, ascending. Nobody else has a say in it."""
        others = np.delete(np.arange(self.clients), own)
        if self.complete:
            return others
        return others[uniform_subset(self.holders, len(others), entropy)]
