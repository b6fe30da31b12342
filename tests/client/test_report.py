"""Text for terminals. Class names come from the server's plan and must not steer the terminal that shows them."""

from __future__ import annotations

from pathlib import Path

from pfed_client.evaluation import ClassScore, Evaluation
from pfed_client.prediction import ClassGuess, Prediction
from pfed_client.report import evaluation_json, evaluation_table, prediction_lines


def test_evaluation() -> None:
    evaluation = Evaluation("a", 3, (ClassScore("cat", 4, 3), ClassScore("laptop", 0, 0), ClassScore("dog", 6, 6)))
    assert evaluation_table(evaluation).splitlines() == [
        "a, round 3: 90.0 % of 10 own test images",
        "  cat      75.0 % of 4",
        "  dog     100.0 % of 6",
    ]
    assert evaluation_json(evaluation) == {
        "client": "a",
        "trained_round": 3,
        "n_test": 10,
        "accuracy": 0.9,
        "classes": {
            "cat": {"n_test": 4, "accuracy": 0.75},
            "laptop": {"n_test": 0, "accuracy": None},
            "dog": {"n_test": 6, "accuracy": 1.0},
        },
    }


def test_prediction() -> None:
    guesses = (ClassGuess("cat", 0.75, (0.5, 0.2, 0.3)), ClassGuess("catfish", 0.2, None))
    prediction = Prediction(Path("x.png"), guesses)
    assert list(prediction_lines(prediction, explain=True)) == [
        "x.png",
        "  cat       75.0 %   own prompt 50 %, expert 1 20 %, expert 2 30 %",
        "  catfish   20.0 %   own prompt alone",
    ]
    assert list(prediction_lines(prediction, explain=False))[1] == "  cat       75.0 %"


def test_names_cannot_steer_the_terminal() -> None:
    name = "cat\x1b[2J\nroot: all is well"
    table = evaluation_table(Evaluation("a", 1, (ClassScore(name, 1, 1),)))
    lines = list(prediction_lines(Prediction(Path("x.png"), (ClassGuess(name, 1.0, None),)), explain=False))
    assert len(table.splitlines()) == len(lines) == 2
    assert "\x1b" not in table + "".join(lines)
