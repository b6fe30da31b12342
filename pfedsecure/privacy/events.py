"""What a ledger is told before noise is drawn: events, never an epsilon, which depends on everything else released."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GaussianRelease:
    """One use of the Gaussian mechanism on all of a client's data.

    `what` was released, of training round `round`; `noise_multiplier` is the noise's standard deviation over the
    sensitivity in Euclidean norm, so that events of any scale compose.
    """

    what: str
    round: int
    noise_multiplier: float


@dataclass(frozen=True)
class SampledGaussianSteps:
    """`steps` uses of the Gaussian mechanism, each on a Poisson sample of a client's data: DP-SGD.

    Every example is in each sample with probability `sample_rate`, independently of all others; `noise_multiplier` as
    in `GaussianRelease`, with the clipping norm as the sensitivity (add/remove of one example).
    """

    what: str
    round: int
    noise_multiplier: float
    sample_rate: float
    steps: int


Event = GaussianRelease | SampledGaussianSteps
