"""The way of matching that a plan asks for.

Homomorphic encryption is loaded where it is asked for: others start without it.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import ProtectionUnavailable
from pfedsecure.matching.dp import DpClientMatching, DpServerMatching
from pfedsecure.matching.interface import ClientMatching, ServerMatching
from pfedsecure.matching.kept import Kept
from pfedsecure.matching.lot import LotClientMatching, LotServerMatching
from pfedsecure.matching.plain import PlainClientMatching, PlainServerMatching
from pfedsecure.matching.release import Record, Release, noise_multiplier
from pfedsecure.matching.sketch import Sketcher
from pfedsecure.pki.cohort import CohortSecrets
from pfedsecure.pki.identity import Identity
from pfedsecure.plan import Plan
from pfedsecure.seeds import derive_seed


def client_matching(
    plan: Plan,
    initial: NDArray[np.float32],
    identity: Identity | None,
    kept: Kept,
    record: Record,
    *,
    private_prompt: bool = False,
) -> ClientMatching:
    """The client's side; `initial (n, d)` is the context that the federation starts from.

    `private_prompt`: this client's prompts come out of differentially private training, all of them, so that a sketch
    is a function of what is private already: no noise is added to it and nothing is recorded.
    `kept` outlives a crash; `record` is told of each release of noised numbers before their noise is drawn. Raises
    ProtectionUnavailable without the identity that encrypted matching takes, IdentityError when its folder lacks the
    cohort's secret.
    """
    if not plan.n_experts:
        return LotClientMatching()  # nothing is matched
    release = None if private_prompt else _release(plan, kept, record)
    match plan.protection.matching:
        case "plain":
            return PlainClientMatching()
        case "random":
            return LotClientMatching()
        case "dp":
            return DpClientMatching(sketcher(plan, initial), release)
        case "he":
            if identity is None:
                raise ProtectionUnavailable(
                    'the plan asks for protection.matching = "he", which takes certificates: use TLS, or a plan that '
                    'asks for "random"'
                )
            secrets = partial(CohortSecrets.load, identity.folder)
            secrets()
            from pfedsecure.matching.he.client import HeClientMatching

            return HeClientMatching(sketcher(plan, initial), secrets, kept, release)


def server_matching(
    plan: Plan, shape: tuple[int, int], executor: Executor | None = None, scratch: Path | None = None
) -> ServerMatching:
    """The server's side for contexts of `shape (n, d)`. `executor` runs what takes long; by default processes do.

    `scratch` is a folder that matching may empty and fill; by default a temporary one.
    """
    if not plan.n_experts:
        return LotServerMatching(plan.seed)
    matching = plan.matching
    match plan.protection.matching:
        case "plain":
            return PlainServerMatching(shape, plan.prompt.max_norm)
        case "random":
            return LotServerMatching(plan.seed)
        case "dp":
            assert matching.epsilon is not None  # says the plan
            return DpServerMatching(matching.dimension, noise_multiplier(matching.epsilon, matching.delta))
        case "he":
            from pfedsecure.matching.he.server import HeServerMatching

            return HeServerMatching(matching.dimension, executor, scratch)


def sketcher(plan: Plan, initial: NDArray[np.float32]) -> Sketcher:
    """Makes the plan's sketches: all parties of a federation have the same projection."""
    matching = plan.matching
    return Sketcher(initial, matching.dimension, matching.clip, derive_seed(plan.seed, "matching projection"))


def _release(plan: Plan, kept: Kept, record: Record) -> Release | None:
    matching = plan.matching
    return None if matching.epsilon is None else Release(matching.epsilon, matching.delta, kept, record)
