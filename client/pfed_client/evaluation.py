"""How good a saved client's model is on its own test images."""

from __future__ import annotations

from dataclasses import dataclass

from pfed_client.participant import prepare
from pfed_client.saved import SavedClient


@dataclass(frozen=True)
class ClassScore:
    """Of one class: number of test images, and how many of them are recognised."""

    name: str
    n_test: int
    correct: int


@dataclass(frozen=True)
class Evaluation:
    """`classes` in the order of the plan; one may have no test image."""

    client: str
    trained_round: int
    classes: tuple[ClassScore, ...]

    @property
    def n_test(self) -> int:
        """Test images of all classes."""
        return sum(score.n_test for score in self.classes)

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return sum(score.correct for score in self.classes) / self.n_test


def evaluate(client: SavedClient, device: str) -> Evaluation:
    """Evaluate the newest model on the test images that the client never trained on: the same split as in training.

    Raises StateError, DataError, ClassNamesMismatch, BackboneError or CheckpointMismatch.
    """
    images, rows = client.split()
    participant = prepare(
        client.plan,
        client.name,
        client.settings,
        images,
        device=device,
        cache_dir=client.folder / "features",
        trains=False,
        rows=rows,
    )
    model = client.model(participant.backbone.digest)
    predicted = participant.trainer.predict(model, participant.test.features).argmax(dim=1)
    labels = participant.test.labels
    return Evaluation(
        client.name,
        model.trained_round,
        tuple(
            ClassScore(name, int((labels == label).sum()), int(((labels == label) & (predicted == label)).sum()))
            for label, name in enumerate(client.plan.class_names)
        ),
    )
