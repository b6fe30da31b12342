"""Clients that train on the actors of a Ray cluster. Server and sessions stay in this process.

A round of training is a pure function of what the actor is given: where it runs, and how often after an actor died,
changes nothing. That is not so with differential privacy, whose noise is drawn anew each time and has been paid for:
private clients do not train here.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import click
import torch

from pfed_cli.simulate.elsewhere import TrainerElsewhere
from pfed_client.frozen_prompts import FrozenPrompts
from pfed_client.local_model import Array, LocalModel
from pfed_client.participant import agreed_backbone
from pfed_client.state import Settings
from pfed_client.trainer import RoundReport, StepCallback, Trainer
from pfed_client.training import RoundTrainer
from pfedsecure.clip.features import FeatureSet
from pfedsecure.errors import BackboneError, CheckpointMismatch, ServerUnreachable
from pfedsecure.plan import Plan

LOCAL = "local"
RESTARTS = 3
"""Times that an actor may die and is started again, its work with it."""

Method = Literal["train_round", "evaluate", "lent"]


@dataclass(frozen=True)
class Outfit:
    """What an actor makes its trainers of."""

    plan: Plan
    settings: Settings
    device: str
    threads: int
    digest: str
    """Of the backbone that this process uses: an actor with another is refused."""
    kept_prompts: int
    """How many prompts' text features an actor keeps."""


class TrainingActor:
    """One process of the cluster: the backbone, loaded once, and all clients' features.

    `features`: training and test set of each client by name. Raises CheckpointMismatch for another backbone.
    """

    def __init__(self, outfit: Outfit, features: Mapping[str, tuple[FeatureSet, FeatureSet]]) -> None:
        torch.set_num_threads(outfit.threads)
        self._plan = outfit.plan
        self._backbone = agreed_backbone(outfit.plan, outfit.settings, outfit.device)
        if self._backbone.digest != outfit.digest:
            raise CheckpointMismatch(
                "a machine of the Ray cluster has other weights of the model than this one; give the same file to all"
            )
        self._frozen = FrozenPrompts(outfit.plan, self._backbone, outfit.kept_prompts)
        self._features = features
        self._trainers: dict[str, Trainer] = {}

    def ready(self) -> bool:
        """Whether it is there."""
        return True

    def call(self, name: str, method: Method, arguments: Sequence[Any]) -> Any:
        """What the trainer of the client `name` returns."""
        if name not in self._trainers:
            train, test = self._features[name]
            self._trainers[name] = Trainer(self._plan, self._backbone, train, test, name=name, frozen=self._frozen)
        return getattr(self._trainers[name], method)(*arguments)


class OnRay:
    """`Workers` on a Ray cluster: that at `address`, or for LOCAL one of this machine that ends with `stop`.

    `actors`: how many, by default as many as the cluster has room for; each takes `outfit.threads` CPUs. Raises
    click.UsageError without the package ray or for more actors than there is room for, ServerUnreachable when there is
    no such cluster, and what an actor raises that cannot load the backbone.
    """

    def __init__(
        self,
        address: str,
        outfit: Outfit,
        features: Mapping[str, tuple[FeatureSet, FeatureSet]],
        actors: int | None = None,
    ) -> None:
        self._ray = _connected(address)
        self._stopped = False
        try:
            self.threads = self._room(outfit, actors)
            self._free: queue.Queue[Any] = queue.Queue()
            self._actors = self._started(outfit, features)
        except BaseException:
            self._ray.shutdown()
            raise
        for actor in self._actors:
            self._free.put(actor)

    @property
    def actors(self) -> Sequence[Any]:
        """Ray's handles."""
        return self._actors

    def start(self, names: Sequence[str], version: Callable[[], int]) -> None:
        return

    def trainer(self, name: str, trainer: Trainer) -> RoundTrainer:
        return RemoteTrainer(self, name, trainer)

    def waiting(self, name: str, version: int) -> AbstractContextManager[None]:
        return nullcontext()

    def gone(self, name: str) -> None:
        return

    def stop(self) -> None:
        self._stopped = True
        for actor in self._actors:
            self._ray.kill(actor)  # whoever waits for one in a thread is told
        self._ray.shutdown()

    def call(self, name: str, method: Method, *arguments: Any) -> Any:
        """What the client's trainer returns, on the first actor that is free; from any thread.

        Raises ServerUnreachable when the actor died once too often.
        """
        actor = self._free.get()
        try:
            return self._ray.get(actor.call.remote(name, method, arguments))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            what = "the simulation ended" if self._stopped else str(error).strip().splitlines()[0]
            raise ServerUnreachable(
                f"an actor of the Ray cluster was lost {RESTARTS + 1} times ({what}); see whether its machines have "
                "enough memory, or use fewer --workers"
            ) from None
        finally:
            self._free.put(actor)

    def _room(self, outfit: Outfit, actors: int | None) -> int:
        resources = self._ray.cluster_resources()
        room = int(resources.get("CPU", 0)) // outfit.threads
        if outfit.device.startswith("cuda"):
            room = min(room, int(resources.get("GPU", 0)))
        if room < (actors or 1):
            raise click.UsageError(
                f"the Ray cluster has room for {room} actors with --threads {outfit.threads} on {outfit.device}, "
                f"not {actors or 1}; ask for fewer --workers"
            )
        return actors or room

    def _started(self, outfit: Outfit, features: Mapping[str, tuple[FeatureSet, FeatureSet]]) -> list[Any]:
        gpus = 1 if outfit.device.startswith("cuda") else 0
        remote = self._ray.remote(
            num_cpus=outfit.threads, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
        )(TrainingActor)
        self._features = self._ray.put(dict(features))  # held on to: an actor that starts again needs them
        actors = [remote.remote(outfit, self._features) for _ in range(self.threads)]
        try:
            self._ray.get([actor.ready.remote() for actor in actors])
        except self._ray.exceptions.RayError as error:
            raise BackboneError(
                f"an actor of the Ray cluster cannot start ({_cause(error)}); every machine needs pfedsecure and the "
                "files of the model, under the same paths"
            ) from None
        return actors


class RemoteTrainer(TrainerElsewhere):
    """A client's trainer whose work `on_ray` does; `trainer` makes what takes none."""

    def __init__(self, on_ray: OnRay, name: str, trainer: Trainer) -> None:
        super().__init__(name, trainer)
        self._on_ray = on_ray

    def train_round(
        self,
        model: LocalModel,
        start: Array,
        experts: Array,
        round_number: int,
        on_step: StepCallback | None = None,
    ) -> tuple[LocalModel, RoundReport]:
        trained: LocalModel
        report: RoundReport
        trained, report = self._on_ray.call(self._name, "train_round", model, start, experts, round_number)
        if on_step is not None:
            on_step(report.steps, report.steps, report.train_loss)  # steps are not followed across machines
        return trained, report

    def lent(self, model: LocalModel) -> Array:
        lent: Array = self._on_ray.call(self._name, "lent", model)
        return lent

    def evaluate(self, model: LocalModel) -> float:
        accuracy: float = self._on_ray.call(self._name, "evaluate", model)
        return accuracy


def _connected(address: str) -> Any:
    """The module ray, connected."""
    try:
        import ray
    except ImportError:
        raise click.UsageError("--ray needs the package ray: pip install 'pfedsecure[ray]'") from None
    try:
        local = {"include_dashboard": False} if address == LOCAL else {}
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ServerUnreachable(
            f"--ray {address}: no Ray cluster there ({reason}); start one with `ray start`"
        ) from None
    return ray


def _cause(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
