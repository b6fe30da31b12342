"""What a client that asks for differential privacy promises at joining, for the whole federation: `privacy.json`.

Epsilon and delta are the user's. The noise follows from them and from the plan's rounds and steps, once and for all:
another round, another client or a restart changes nothing. All that follows is made of public numbers and of one number
of this client's, how many images it trains on. Under adding or removing an example that is data like any other, so it
is released with noise, as the first event of the budget, and everything that depends on it afterwards (sample rate,
weight in the mean, the default delta) is made of the noised number. Its noise has five times the standard deviation of
a release that would use the whole budget, so that it takes a 25th of it, in terms of 1 / sigma^2: 3 images at epsilon
8, 19 at 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfed_client.files import write_atomically
from pfedsecure.errors import BudgetExhausted, BudgetTooSmall, StateError
from pfedsecure.plan import Plan, first_problem
from pfedsecure.privacy.accountant import MAX_NOISE_MULTIPLIER, noise_multiplier
from pfedsecure.privacy.accountant import epsilon as total_epsilon
from pfedsecure.privacy.budget import Budget
from pfedsecure.privacy.calibration import analytic_sigma
from pfedsecure.privacy.events import Event, GaussianRelease, SampledGaussianSteps
from pfedsecure.privacy.noise import RoundedGaussian
from pfedsecure.secagg.entropy import Entropy

SIZE = "number of training images"
TRAINING = "prompt and gate"
"""What events are of."""

DEFAULT_DELTA = 1e-5
_DELTA_TIMES_SIZE = 0.1
"""The default delta times the number of images is at most this: with delta = 1/n one could publish an image whole."""
_SIZE_NOISE = 5.0

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Promise(BaseModel):
    """The content of privacy.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    size: Annotated[int, Field(ge=1)]
    """The number of training images, noised; at least 1."""
    size_noise_multiplier: Positive
    noise_multiplier: Positive
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    """Of a round."""
    rounds: Annotated[int, Field(ge=1)]
    row: str = ""
    """The head of the row in the ledger that says so; empty where there is no ledger."""

    def event(self, round_number: int) -> SampledGaussianSteps:
        """What training in one round releases."""
        return SampledGaussianSteps(TRAINING, round_number, self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def size_event(self) -> GaussianRelease:
        """The release of the number of images, which every promise begins with."""
        return GaussianRelease(SIZE, 0, self.size_noise_multiplier)

    def in_words(self) -> str:
        """For the user."""
        return (
            f"epsilon {self.epsilon:g}, delta {self.delta:g} for all {self.rounds} rounds: {self.steps} steps each on "
            f"a share of {self.sample_rate:.3g} of the images, noise of {self.noise_multiplier:.3g} times the clip"
        )


def promise(
    plan: Plan,
    epsilon: float,
    delta: float | None,
    n_train: int,
    budget: Callable[[float, float], Budget],
    spent: Iterable[Event] = (),
    largest_delta: float = DEFAULT_DELTA,
    entropy: Entropy = os.urandom,
) -> Promise:
    """Solve for the noise of a federation with `plan`, of a client with `n_train` training images.

    `budget(epsilon, delta)` is asked for the release of the noised number of images. `spent`: what was released of the
    same images before, say by an attempt to join that came to nothing; it counts. `largest_delta`: of a default one.
    Raises BudgetTooSmall, which says
    what is possible, and BudgetExhausted; in the first case the noised number may have been drawn, but nobody saw it.
    """
    settings = plan.privacy
    rounds, steps = plan.rounds.count, settings.steps
    asked = largest_delta if delta is None else delta
    spent = list(spent)
    released = GaussianRelease(SIZE, 0, _size_noise(epsilon, asked))
    before, least = total_epsilon(spent, asked), total_epsilon([*spent, released], asked)
    if spent and least > epsilon:
        raise BudgetExhausted(
            f"these images have spent epsilon {before:.3g} already, in other federations or attempts to join, and the "
            f"budget is for all of it together: it takes well over {least:.3g}, which is a new decision about the "
            "people in the images"
        )
    if least > epsilon:
        raise BudgetTooSmall(
            f"epsilon {epsilon:g} with delta {asked:g} is too small: it takes well over {least:.1g}; ask for more"
        )
    reserved = budget(epsilon, asked).reserve(released)
    size = max(1, n_train + int(RoundedGaussian(released.noise_multiplier).sample(1, entropy)[0]))
    reserved.commit()
    if delta is None:
        asked = min(largest_delta, _DELTA_TIMES_SIZE / size)
    elif asked * size >= 1:
        raise BudgetTooSmall(
            f"delta {asked:g} protects nobody among some {size} images: one of them could be published outright; take "
            f"one well below {1 / size:.2g}"
        )
    rate = min(1.0, settings.batch_size / size)
    return Promise(
        epsilon=epsilon,
        delta=asked,
        size=size,
        size_noise_multiplier=released.noise_multiplier,
        noise_multiplier=noise_multiplier(epsilon, asked, rate, rounds * steps, besides=[*spent, released]),
        sample_rate=rate,
        steps=steps,
        rounds=rounds,
    )


def _size_noise(epsilon: float, delta: float) -> float:
    """Capped, so that of an epsilon that is far too small the accountant can say what would be possible."""
    most = _SIZE_NOISE * MAX_NOISE_MULTIPLIER
    try:
        return min(_SIZE_NOISE * analytic_sigma(epsilon, delta, 1.0), most)
    except ValueError:
        return most


class PromiseFile:
    """privacy.json of one state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Promise | None:
        """None when there is none. Raises StateError."""
        try:
            return Promise.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"{self._path}: cannot be read ({error.strerror}); mend its permissions") from None
        except ValidationError as error:
            raise StateError(f"{self._path}: damaged ({first_problem(error)}); restore it from a copy") from None

    def write(self, made: Promise) -> None:
        """Replace it. Raises StateError."""
        write_atomically(self._path, made.model_dump_json(indent=2).encode() + b"\n")
