"""Evaluations and predictions for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from pfed_client.evaluation import Evaluation
from pfed_client.prediction import Prediction

_OWN_PROMPT = "own prompt"


def evaluation_json(evaluation: Evaluation) -> dict[str, object]:
    """Accuracies in [0, 1]; null for a class without test images."""
    return {
        "client": evaluation.client,
        "trained_round": evaluation.trained_round,
        "n_test": evaluation.n_test,
        "accuracy": evaluation.accuracy,
        "classes": {
            score.name: {"n_test": score.n_test, "accuracy": score.correct / score.n_test if score.n_test else None}
            for score in evaluation.classes
        },
    }


def evaluation_table(evaluation: Evaluation) -> str:
    """One line for all classes, then one for each that has test images."""
    width = max(len(score.name) for score in evaluation.classes)
    lines = [
        f"{evaluation.client}, round {evaluation.trained_round}: {100 * evaluation.accuracy:.1f} % of "
        f"{evaluation.n_test} own test images"
    ]
    lines += [
        f"  {score.name:<{width}}  {100 * score.correct / score.n_test:5.1f} % of {score.n_test}"
        for score in evaluation.classes
        if score.n_test
    ]
    return "\n".join(lines)


def prediction_json(prediction: Prediction) -> dict[str, object]:
    """`weights`: of the own prompt, then of each expert, the nearest first."""
    return asdict(prediction) | {"image": str(prediction.image)}


def prediction_lines(prediction: Prediction, *, explain: bool) -> Iterator[str]:
    """The image, then a line for each class; with `explain` what each expert weighed in it."""
    yield f"{prediction.image}"
    width = max(len(guess.name) for guess in prediction.classes)
    for guess in prediction.classes:
        line = f"  {guess.name:<{width}}  {100 * guess.probability:5.1f} %"
        if explain:
            line += "   " + _weights(guess.weights)
        yield line


def _weights(weights: tuple[float, ...] | None) -> str:
    if weights is None:
        return f"{_OWN_PROMPT} alone"
    names = [_OWN_PROMPT, *(f"expert {number}" for number in range(1, len(weights)))]
    return ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in zip(names, weights, strict=True))
