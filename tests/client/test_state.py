"""The state directory: who may use it, what it takes for damaged, and that a failed change changes nothing."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfed_client.files import write_atomically
from pfed_client.metrics import MetricsLog, RoundRecord
from pfed_client.saved import SavedClient
from pfed_client.state import ClientState, Settings, model_owner, read_record
from pfedsecure.errors import CheckpointMismatch, StateError, StateLocked
from pfedsecure.plan import Plan

SETTINGS = Settings(
    data="demo:0/5",
    data_root=Path("/somewhere"),
    test_fraction=0.5,
    strict=False,
    model=None,
    pretrained=None,
    backbone_dir=None,
    precision="fp32",
)


def record(number: int, loss: float = 0.5) -> RoundRecord:
    return RoundRecord(number, loss, 0.75, 10, 2, 100, 200, 1.5)


def test_everything_comes_back(tmp_path: Path, make_plan: Callable[..., Plan], make_trainer: Any) -> None:
    plan = make_plan(mixture__lambda=0.25)
    owner = model_owner(plan, "b" * 64)
    model = make_trainer("a").new_model()
    with ClientState(tmp_path / "a") as state:
        state.claim("a")
        state.pin(plan, "f" * 32)
        state.remember(SETTINGS, "d" * 64)
        assert state.load_model(owner) is None
        state.save_model(model, owner)
        instance_id = state.record.instance_id
    with ClientState(tmp_path / "a") as state:
        state.claim("a")
        assert state.record.plan == plan
        assert state.record.plan.digest() == plan.digest()
        assert state.record.federation_id == "f" * 32
        assert state.record.settings == SETTINGS
        assert state.record.data_fingerprint == "d" * 64
        assert state.record.instance_id == instance_id
        loaded = state.load_model(owner)
        assert loaded is not None
        assert loaded.gate["W"].tobytes() == model.gate["W"].tobytes()


def test_instances_differ(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        with ClientState(tmp_path / name) as state:
            state.claim(name)
            ids.add(state.record.instance_id)
    assert len(ids) == 2


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    with ClientState(tmp_path / "deep" / "a") as state:
        state.claim("a")
        assert stat.S_IMODE(state.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((state.folder / "client.json").stat().st_mode) == 0o600


def test_images_may_change_until_the_federation_is_joined(tmp_path: Path, make_plan: Callable[..., Plan]) -> None:
    with ClientState(tmp_path / "a") as state:
        state.claim("a")
        state.check_data(SETTINGS, "1" * 64)
        state.remember(SETTINGS, "1" * 64)
        state.check_data(SETTINGS, "2" * 64)
        state.remember(SETTINGS, "2" * 64)
        state.pin(make_plan(), "f" * 32)
        state.check_data(SETTINGS, "2" * 64)
        with pytest.raises(StateError, match=r"a: the images of demo:0/5 are not .*fingerprint 1{12}, then 2{12}"):
            state.check_data(SETTINGS, "1" * 64)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pfed_client.state import ClientState\n"
        "with ClientState(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(StateLocked, match=r"another client uses this state directory.*--state"):
            ClientState(tmp_path / "a")
        other.kill()  # a lock does not outlive its process
    ClientState(tmp_path / "a").close()


def test_it_belongs_to_one_client(tmp_path: Path) -> None:
    with ClientState(tmp_path / "a") as state:
        state.claim("a")
        before = (tmp_path / "a" / "client.json").read_bytes()
        with pytest.raises(StateError, match="belongs to client a, not b"):
            state.claim("b")
        assert (tmp_path / "a" / "client.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged .not JSON"),
        ('{"format": 1, "name": "a"', "damaged .not JSON"),
        ("[]", "damaged .not a JSON object"),
        ("1", "damaged .not a JSON object"),
        pytest.param("[" * 100_000, "damaged .not JSON", id="nested too deep"),
        ('{"format": 1, "name": "a"}', "instance_id is missing"),
        ('{"format": 1, "name": "a", "instance_id": "i", "extra": 1}', "extra is not a known setting"),
        ('{"format": 1, "name": "a", "instance_id": "i", "federation_id": "f"}', "belong together"),
        ('{"format": 1, "name": "a", "instance_id": "i", "data_fingerprint": "f"}', "belong together"),
        (
            '{"format": 1, "name": "a", "instance_id": "i", "plan": {"class_names": ["x"]}, "federation_id": "f"}',
            "plan",
        ),
        ('{"format": 2, "name": "a", "novelty": 1}', "newer version .format 2, known 1.*install that version"),
    ],
)
def test_damaged_records(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "client.json").write_text(content)
    with pytest.raises(StateError, match=f"client.json: .*{message}"):
        ClientState(tmp_path)
    assert (tmp_path / "client.json").read_text() == content
    (tmp_path / "client.json").unlink()
    ClientState(tmp_path).close()  # the lock was let go


@pytest.mark.parametrize("size", [0, 7, -1])
def test_truncated_models(tmp_path: Path, make_plan: Callable[..., Plan], make_trainer: Any, size: int) -> None:
    owner = model_owner(make_plan(), "b" * 64)
    path = tmp_path / "model.safetensors"
    with ClientState(tmp_path) as state:
        state.save_model(make_trainer("a").new_model(), owner)
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        with pytest.raises(StateError, match=r"model.safetensors: the saved model is damaged"):
            state.load_model(owner)
        assert path.read_bytes() == whole[:size]


def test_models_of_another_plan_or_backbone(tmp_path: Path, make_plan: Callable[..., Plan], make_trainer: Any) -> None:
    with ClientState(tmp_path) as state:
        state.save_model(make_trainer("a").new_model(), model_owner(make_plan(), "b" * 64))
        with pytest.raises(CheckpointMismatch, match="another plan"):
            state.load_model(model_owner(make_plan(seed=2), "b" * 64))
        with pytest.raises(CheckpointMismatch, match="another backbone"):
            state.load_model(model_owner(make_plan(), "c" * 64))


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used as state directory"):
        ClientState(tmp_path / "file")
    with pytest.raises(StateError, match="cannot be used as state directory"):
        ClientState(tmp_path / "file" / "a")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(StateError, match="there: cannot be written"):
        write_atomically(tmp_path / "there", b"new")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / ".old.new").mkdir()
    with pytest.raises(StateError, match="old: cannot be written"):
        write_atomically(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"old"


def test_what_a_killed_writer_left_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".file.new").write_bytes(b"half")
    write_atomically(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_metrics_are_one_json_line_a_round(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.add(record(1))
    log.add(record(3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "round": 3,
        "train_loss": 0.5,
        "test_accuracy": 0.75,
        "n_train": 10,
        "n_experts": 2,
        "bytes_up": 100,
        "bytes_down": 200,
        "seconds": 1.5,
    }
    log.add(record(3, loss=0.25))  # trained again after a crash
    assert log.read() == [record(1), record(3, loss=0.25)]
    assert log.of(3) == record(3, loss=0.25)
    assert log.of(2) is None
    log.forget_from(2)
    assert log.read() == [record(1)]


@pytest.mark.parametrize("line", ["", "{", '{"round": 2}', "[]", "NaN"])
def test_damaged_metrics(tmp_path: Path, line: str) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.add(record(1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StateError, match=r"metrics.jsonl: line 2 is not a round's record"):
        log.add(record(2))


def test_saved_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plan: Callable[..., Plan]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StateError, match="there is no client in state/clients"):
        SavedClient.open(None)
    for name in ("a", "b"):
        with ClientState(Path("state/clients") / name) as state:
            state.claim(name)
            with pytest.raises(StateError, match="holds no client that joined"):
                SavedClient.open(state.folder)
            state.pin(make_plan(), "f" * 32)
            state.remember(SETTINGS, "d" * 64)
            client = SavedClient.open(None if name == "a" else state.folder)  # also while another process has the lock
            assert (client.name, client.plan, client.settings) == (name, make_plan(), SETTINGS)
            with pytest.raises(StateError, match="holds no model yet"):
                client.model("b" * 64)
    with pytest.raises(StateError, match=r"several clients in state/clients \(a, b\); give --state"):
        SavedClient.open(None)
    assert read_record(Path("nowhere")) is None
