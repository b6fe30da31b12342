"""Evaluations and predictions for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from pfed_client.evaluation import Evaluation
from pfed_client.prediction import Prediction
from pfedsecure.console import one_line

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
    names = [one_line(score.name) for score in evaluation.classes]  # the plan came from the server
    width = max(map(len, names))
    lines = [
        f"{evaluation.client}, round {evaluation.trained_round}: {100 * evaluation.accuracy:.1f} % of "
        f"{evaluation.n_test} own test images"
    ]
    lines += [
        f"  {name:<{width}}  {100 * score.correct / score.n_test:5.1f} % of {score.n_test}"
        for name, score in zip(names, evaluation.classes, strict=True)
        if score.n_test
    ]
    return "\n".join(lines)


def prediction_json(prediction: Prediction) -> dict[str, object]:
    """`weights`: of the own prompt, then of each expert, the nearest first."""
    return asdict(prediction) | {"image": str(prediction.image)}


def prediction_lines(prediction: Prediction, *, explain: bool) -> Iterator[str]:
    """The image, then a line for each class; with `explain` what each expert weighed in it."""
    yield f"{prediction.image}"
    names = [one_line(guess.name) for guess in prediction.classes]
    width = max(map(len, names))
    for name, guess in zip(names, prediction.classes, strict=True):
        line = f"  {name:<{width}}  {100 * guess.probability:5.1f} %"
        if explain:
            line += "   " + _weights(guess.weights)
        yield line


def _weights(weights: tuple[float, ...] | None) -> str:
    if weights is None:
        return f"{_OWN_PROMPT} alone"
    names = [_OWN_PROMPT, *(f"expert {number}" for number in range(1, len(weights)))]
    return ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in zip(names, weights, strict=True))
