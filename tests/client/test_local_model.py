from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from pfed_client.local_model import LocalModel, content_digest
from pfedsecure.errors import CheckpointMismatch, StateError

OWNER = {"plan": "p" * 64, "backbone": "b" * 64}


def model() -> LocalModel:
    generator = np.random.default_rng(0)
    gate = {f"W_{m}.{kind}": generator.random((3, 2), np.float32) for m in "qkvo" for kind in ("weight", "bias")}
    experts = generator.random((0, 2, 5), np.float32)
    return LocalModel(generator.random((2, 5), np.float32), gate, experts, 7, 30, "ab" * 32)


def test_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    again = LocalModel.load(tmp_path / "model", belongs_to=OWNER)
    assert (again.trained_round, again.n_train, again.start_digest) == (7, 30, "ab" * 32)
    np.testing.assert_array_equal(again.context, model().context)
    assert again.experts.shape == (0, 2, 5)
    assert again.gate.keys() == model().gate.keys()
    assert all(np.array_equal(again.gate[key], model().gate[key]) for key in again.gate)


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for number in range(20):  # an order that is random would show
        model().save(tmp_path / str(number), belongs_to=OWNER)
        files.append((tmp_path / str(number)).read_bytes())
    assert len(set(files)) == 1


@pytest.mark.parametrize("key", OWNER)
def test_of_another_plan_or_backbone(tmp_path: Path, key: str) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    with pytest.raises(CheckpointMismatch, match=f"the saved model is of another {key}"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER | {key: "x" * 64})


@pytest.mark.parametrize("kept", [0, 9, 200, -1])
def test_damaged(tmp_path: Path, kept: int) -> None:
    model().save(tmp_path / "model", belongs_to=OWNER)
    whole = (tmp_path / "model").read_bytes()
    (tmp_path / "model").write_bytes(whole[:kept])
    with pytest.raises(StateError, match="the saved model is damaged"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER)


def test_every_changed_bit_of_the_tensors_is_found(tmp_path: Path) -> None:
    """The floats stay finite and the shapes fit: nothing but the digest can tell."""
    model().save(tmp_path / "model", belongs_to=OWNER)
    whole = (tmp_path / "model").read_bytes()
    for position in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "model").write_bytes(damaged)
        with pytest.raises(StateError, match=r"the saved model is damaged .its content is not what was saved"):
            LocalModel.load(tmp_path / "model", belongs_to=OWNER)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object], *, signed: bool) -> None:
    """Change tensors and what is said of them; `signed`: with a digest that fits, as no accident would leave it."""
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["pfedsecure"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    change(tensors, about)
    if signed:
        del about["sha256"]
        about["sha256"] = content_digest(tensors, about)
    path.write_bytes(save(tensors, {"pfedsecure": json.dumps(about)}))


UNSIGNED: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "a gate tensor is missing": lambda tensors, about: tensors.pop("gate.W_q.weight"),
    "a tensor too many": lambda tensors, about: tensors.update(more=tensors["context"]),
    "another name": lambda tensors, about: tensors.update({"gate.W_x": tensors.pop("gate.W_q.bias")}),
    "another shape": lambda tensors, about: tensors.update(context=tensors["context"].reshape(5, 2)),
    "another round": lambda tensors, about: about.update(trained_round=6),
    "other images": lambda tensors, about: about.update(n_train=31),
    "another start": lambda tensors, about: about.update(start_digest="cd" * 32),
    "no digest": lambda tensors, about: about.pop("sha256"),
}
SIGNED: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "not float32": lambda tensors, about: tensors.update(context=tensors["context"].astype(np.float64)),
    "not finite": lambda tensors, about: tensors.update(context=tensors["context"] * np.float32("nan")),
    "no matrix": lambda tensors, about: tensors.update(context=tensors["context"][0]),
    "experts that do not fit": lambda tensors, about: tensors.update(experts=np.zeros((1, 2, 4), np.float32)),
    "no context": lambda tensors, about: tensors.pop("context"),
    "round before the first": lambda tensors, about: about.update(trained_round=-1),
    "no number": lambda tensors, about: about.update(trained_round="7"),
    "no start": lambda tensors, about: about.pop("start_digest"),
    "a start that is no text": lambda tensors, about: about.update(start_digest=7),
    "no owner": lambda tensors, about: about.update(belongs_to="me"),
}


@pytest.mark.parametrize("harm", [*UNSIGNED, *SIGNED])
def test_not_a_model(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "model"
    model().save(path, belongs_to=OWNER)
    rewrite(path, (UNSIGNED | SIGNED)[harm], signed=harm in SIGNED)
    with pytest.raises(StateError, match=r"model: the saved model is damaged .*restore it from a backup"):
        LocalModel.load(path, belongs_to=OWNER)


@pytest.mark.parametrize("about", ["[" * 100_000, "[]", "null", "{}", '{"sha256": 1}', "{"])
def test_metadata_that_says_nothing(tmp_path: Path, about: str) -> None:
    (tmp_path / "model").write_bytes(save({"context": model().context}, {"pfedsecure": about}))
    with pytest.raises(StateError, match="the saved model is damaged"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER)


def test_types_that_numpy_does_not_know(tmp_path: Path) -> None:
    header = b'{"context":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]},"__metadata__":{"pfedsecure":"{}"}}'
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(StateError, match="the saved model is damaged"):
        LocalModel.load(tmp_path / "model", belongs_to=OWNER)
