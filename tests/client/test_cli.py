"""`pfed-client` as users call it: what comes of it, and each mistake with its line and exit code."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

import pfedsecure
from pfed_client.agreement import agree
from pfed_client.classifier import Classifier
from pfed_client.cli import main
from pfed_client.grpc_api import GrpcApi
from pfed_client.local_model import LocalModel, content_digest
from pfed_client.saved import SavedClient
from pfed_client.session import Session
from pfed_client.state import ClientState
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.clip.backbone import load_backbone
from pfedsecure.clip.config import context_shape
from pfedsecure.console import Address
from pfedsecure.data import open_images
from pfedsecure.errors import CheckpointMismatch, StateError
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server

EXAMPLE = Path(pfedsecure.__file__).parents[1] / "docs" / "examples" / "load_export.py"
DEMO_PLAN = Path(pfedsecure.__file__).parent / "demo_plan.toml"
PEERS = ("client-2", "client-3")


def pfed_client(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, exit_code: int, message: str) -> None:
    """The run ended with this code and one line on standard error that has `message` in it."""
    assert result.exit_code == exit_code, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("NOT PROTECTED")]
    assert len(errors) == 1
    assert re.search(f"^pfed-client: error: .*{message}", errors[0])


@dataclass(frozen=True)
class Joined:
    """A machine on which client-1 took part from the first round to the last; the server still answers."""

    home: Path
    address: Address
    plan: Plan
    output: Result

    @property
    def state(self) -> Path:
        return self.home / "state" / "clients" / "client-1"

    def model(self) -> LocalModel:
        return LocalModel.load(self.state / "model.safetensors", belongs_to={"plan": self.plan.digest()})


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory, make_trainer: Any) -> Iterator[Joined]:
    """A real server with mutual TLS, peers that train by a formula, and `pfed-client` with nothing but --server."""
    home = tmp_path_factory.mktemp("home")
    demo = Plan.from_toml(DEMO_PLAN)
    plan = demo.model_copy(
        update={
            "rounds": demo.rounds.model_copy(update={"count": 2}),
            "training": demo.training.model_copy(update={"local_epochs": 1}),
        }
    )
    ready: Future[Address] = Future()
    stop = threading.Event()
    server = threading.Thread(target=lambda: asyncio.run(serve(home, plan, make_trainer, ready, stop)))
    server.start()
    try:
        address = ready.result(timeout=60)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            output = pfed_client("--server", address, "--threads", 1)
        yield Joined(home, address, plan, output)
    finally:
        stop.set()
        server.join()


async def serve(home: Path, plan: Plan, make_trainer: Any, ready: Future[Address], stop: threading.Event) -> None:
    identity = ensure_development_pki(home / "certs" / "dev")
    store = SqlStore.open(home / "server", plan)
    shape = context_shape(plan)
    coordinator = Coordinator(plan, store, context_shape=shape, authority=identity.authority)
    async with serving(coordinator, Address("127.0.0.1", 0), identity) as address:
        start = load_backbone("tiny-clip", "embedded").initial_context(plan)
        trainers = [make_trainer(name, shape=shape, start=start) for name in PEERS]
        peers = [asyncio.create_task(run_peer(home, address, trainer)) for trainer in trainers]
        ready.set_result(address)
        await asyncio.to_thread(stop.wait)
        for peer in peers:
            peer.cancel()
    store.close()


async def run_peer(home: Path, address: Address, trainer: Any) -> None:
    folder = home / "peers" / trainer.name
    identity = enrol(home / "certs" / "dev", trainer.name, "client", folder / "identity")
    with ClientState(folder) as state:
        state.claim(trainer.name)
        async with GrpcApi(address, identity, retry_seconds=10) as api:
            agreement = await agree(api, state)
            await Session(api, agreement, state, trainer, backbone_digest="b" * 64, identity=identity).run()


@pytest.fixture
def home(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which client-1 was started."""
    monkeypatch.chdir(joined.home)
    return joined.home


def test_joining(joined: Joined) -> None:
    assert joined.output.exit_code == 0, joined.output
    lines = joined.output.stdout.splitlines()
    metrics = [json.loads(line) for line in (joined.state / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line.startswith("round")] == [
        f"round {row['round']}/2  loss {row['train_loss']:.2f}  accuracy {100 * row['test_accuracy']:.1f} %  {experts}"
        for row, experts in zip(metrics, ["0 experts", "2 experts"], strict=True)
    ]
    assert lines[-1] == f"finished  accuracy {100 * metrics[-1]['test_accuracy']:.1f} % on the own test images"
    unprotected = [line for line in joined.output.stderr.splitlines() if line.startswith("NOT PROTECTED: ")]
    assert unprotected == [f"NOT PROTECTED: {sentence}" for sentence in joined.plan.unprotected()]
    result = json.loads((joined.state / "result.json").read_text())
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"]


def test_joining_again_when_all_is_over(joined: Joined, home: Path) -> None:
    """Nothing is trained, nothing changes; the options of the first time are remembered."""
    before = {name: (joined.state / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")}
    result = pfed_client("--server", joined.address, "--state", joined.state, "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert {name: (joined.state / name).read_bytes() for name in before} == before


def test_evaluate(joined: Joined, home: Path) -> None:
    metrics = json.loads((joined.state / "metrics.jsonl").read_text().splitlines()[-1])
    answer = json.loads(pfed_client("evaluate", "--json").stdout)
    images = open_images("demo:0/5", strict=True)
    assert answer["accuracy"] == metrics["test_accuracy"]
    assert answer["n_test"] == len(images) - metrics["n_train"]
    assert answer["trained_round"] == 2
    assert list(answer["classes"]) == list(joined.plan.class_names)
    assert sum(score["n_test"] for score in answer["classes"].values()) == answer["n_test"]
    right = sum(score["accuracy"] * score["n_test"] for score in answer["classes"].values() if score["n_test"])
    assert right / answer["n_test"] == pytest.approx(answer["accuracy"])
    table = pfed_client("evaluate", "--state", joined.state).stdout
    assert table.startswith(
        f"client-1, round 2: {100 * answer['accuracy']:.1f} % of {answer['n_test']} own test images"
    )


def test_predict(joined: Joined, home: Path, tmp_path: Path) -> None:
    """An image of each of three digits: the same probabilities as straight from the classifier."""
    images = open_images("demo:0/5", strict=True)
    paths = []
    for row in (0, 50, 100):
        images.image(row).save(tmp_path / f"{row}.png")
        paths.append(tmp_path / f"{row}.png")
    answer = json.loads(pfed_client("predict", *paths, "--top", 10, "--json", "--explain").stdout)
    classifier = Classifier.from_state(SavedClient.open(joined.state))
    expected = classifier.probabilities(classifier.features([images.image(row) for row in (0, 50, 100)])).numpy()
    assert [prediction["image"] for prediction in answer] == [str(path) for path in paths]
    for prediction, row in zip(answer, expected, strict=True):
        found = {guess["name"]: guess["probability"] for guess in prediction["classes"]}
        np.testing.assert_allclose([found[name] for name in joined.plan.class_names], row, rtol=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for guess in prediction["classes"]:
            assert len(guess["weights"]) == 3  # the own prompt and the peers'
            assert sum(guess["weights"]) == pytest.approx(1, abs=1e-5)
    lines = pfed_client("predict", paths[0], "--top", 2, "--explain").stdout.splitlines()
    assert lines[0] == str(paths[0])
    assert len(lines) == 3
    assert re.fullmatch(r"  \w+ +[\d.]+ %   own prompt \d+ %, expert 1 \d+ %, expert 2 \d+ %", lines[1])
    plain = pfed_client("predict", paths[0], "--top", 1).stdout.splitlines()
    assert re.fullmatch(r"  \w+ +[\d.]+ %", plain[1])


def test_predict_without_experts(joined: Joined, home: Path, tmp_path: Path) -> None:
    """After a first round there is no expert yet: the prompt decides alone, and says so."""
    state = tmp_path / "state"
    shutil.copytree(joined.state, state)
    model = joined.model()
    alone = LocalModel(model.context, model.gate, model.experts[:0], trained_round=1, n_train=model.n_train)
    with safe_open(joined.state / "model.safetensors", framework="numpy") as file:
        owner = json.loads(file.metadata()["pfedsecure"])["belongs_to"]
    alone.save(state / "model.safetensors", belongs_to=owner)
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    arguments = ("predict", tmp_path / "black.png", "--state", state, "--top", 1, "--explain")
    assert pfed_client(*arguments).stdout.rstrip().endswith("%   own prompt alone")
    assert json.loads(pfed_client(*arguments, "--json").stdout)[0]["classes"][0]["weights"] is None


def test_export_and_the_example(
    joined: Joined, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported, image = tmp_path / "model.safetensors", tmp_path / "digit.png"
    open_images("demo:0/5", strict=True).image(3).save(image)
    assert pfed_client("export", exported).stdout == f"{exported}: the model of client-1 as of round 2\n"
    model = joined.model()
    with safe_open(exported, framework="numpy") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("context"), model.context)
        np.testing.assert_array_equal(file.get_tensor("experts"), model.experts)
        for name, value in model.gate.items():
            np.testing.assert_array_equal(file.get_tensor(f"gate.{name}"), value)
        assert len(list(file.keys())) == 2 + len(model.gate)
    assert json.loads(metadata["class_names"]) == list(joined.plan.class_names)
    assert Plan.from_json(metadata["plan"]) == joined.plan
    assert (metadata["backbone"], metadata["pretrained"]) == ("tiny-clip", "embedded")

    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(exported), str(image)])
    runpy.run_path(str(EXAMPLE))
    shown = dict(line.rsplit(": ", 1) for line in capsys.readouterr().out.splitlines())
    answer = json.loads(pfed_client("predict", image, "--top", 10, "--json").stdout)
    assert shown == {guess["name"]: f"{100 * guess['probability']:.1f} %" for guess in answer[0]["classes"]}

    with pytest.raises(CheckpointMismatch, match="made with other weights of tiny-clip"):
        Classifier.from_export(exported, pretrained="random")
    exported.write_bytes(exported.read_bytes()[:-9])
    with pytest.raises(StateError, match=r"model.safetensors: not an export of pfed-client"):
        Classifier.from_export(exported)
    with pytest.raises(StateError, match=r"not an export of pfed-client .its format is None"):
        Classifier.from_export(joined.state / "model.safetensors")


@pytest.mark.parametrize("harm", ["no gate", "no experts", "another gate", "another round", "nested plan"])
def test_an_export_that_is_not_what_was_exported(
    joined: Joined, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    exported = tmp_path / "model.safetensors"
    pfed_client("export", exported)
    with safe_open(exported, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    gate = [name for name in tensors if name.startswith("gate.")]
    if harm == "no gate":
        for name in gate:
            del tensors[name]
    elif harm == "no experts":
        del tensors["experts"]
    elif harm == "another gate":
        tensors[gate[0]] = tensors[gate[0]] + np.float32(1)
    elif harm == "another round":
        metadata["trained_round"] = "1"
    else:
        del metadata["sha256"]
        metadata["plan"] = "[" * 100_000
        metadata["sha256"] = content_digest(tensors, metadata)
    exported.write_bytes(save(tensors, metadata))
    with pytest.raises(StateError, match=r"model.safetensors: not an export of pfed-client .*; export the model again"):
        Classifier.from_export(exported)


def test_other_images_than_those_joined_with(joined: Joined, home: Path, tmp_path: Path) -> None:
    """A folder that changes after the client joined: neither training nor evaluation goes on with the new split."""
    state, data = tmp_path / "state", tmp_path / "images"
    shutil.copytree(joined.state, state)
    write_images(data, ["zero", "one"])
    other = (
        r"images of .* are not those that this client joined with .*tested on images.*restore the data, or .* --state"
    )
    refused(pfed_client("--server", joined.address, "--state", state, "--data", data), 60, other)
    record = json.loads((state / "client.json").read_text())
    record["settings"]["data"] = str(data)
    fingerprint = open_images(str(data), strict=True).fingerprint()
    (state / "client.json").write_text(json.dumps(record | {"data_fingerprint": fingerprint}))
    refused(pfed_client("evaluate", "--state", state), 60, r"split\.json: is of other images; restore")
    (state / "split.json").unlink()
    assert pfed_client("evaluate", "--state", state).exit_code == 0
    (data / "one" / "0.png").unlink()
    refused(pfed_client("evaluate", "--state", state), 60, other)
    refused(pfed_client("--server", joined.address, "--state", state), 60, other)


def test_commands_on_what_is_not_there(home: Path, tmp_path: Path) -> None:
    refused(pfed_client("evaluate", "--state", tmp_path), 60, "holds no client that joined")
    refused(pfed_client("predict", tmp_path / "no.png"), 20, "no.png: cannot be read as an image .No such file")
    (tmp_path / "text.png").write_text("text")
    refused(pfed_client("predict", tmp_path / "text.png"), 20, "text.png: cannot be read as an image")
    refused(pfed_client("export", tmp_path / "no" / "file"), 60, "no/file: cannot be written")
    for command in (["predict"], ["predict", "--top", "0", "x"], ["evaluate", "x"], ["export"]):
        assert pfed_client(*command).exit_code == 2


def test_privacy_that_makes_no_sense(home: Path) -> None:
    for value in ("0", "-1", "inf", "nan"):
        result = pfed_client("--dp-epsilon", value)
        assert result.exit_code == 2
        assert "not over 0 and finite" in result.stderr
    for options, message in (
        (["--dp-delta", "1e-6"], "--dp-delta goes with --dp-epsilon"),
        (["--dp-epsilon", "8", "--dp-delta", "1"], "--dp-delta"),
        (["--dp-epsilon", "8", "--share-metrics"], "--share-metrics does not go with --dp-epsilon"),
    ):
        result = pfed_client("--name", "client-9", *options)
        assert result.exit_code == 2
        assert message in result.stderr


def test_options_of_joining_before_a_command_are_not_ignored(home: Path) -> None:
    result = pfed_client("--name", "x", "evaluate")
    assert result.exit_code == 2
    assert "--name is of joining; options of evaluate stand behind it" in result.stderr


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "privacy afterwards": (
        ["--state", "state/clients/client-1", "--dp-epsilon", "8"],
        60,
        "holds a model that was trained without differential privacy",
    ),
    "no such plan": (["--plan", "no.toml"], 10, "no.toml: cannot read the plan"),
    "no such identity": (["--identity", "nobody"], 40, "nobody holds no identity"),
    "another's identity": (
        ["--identity", "peers/client-2/identity", "--name", "client-3"],
        40,
        "the certificate is of client-2, not of client-3; leave --name off",
    ),
    "a server's identity": (["--identity", "certs/dev/server"], 40, "identity of a server, a client is needed"),
    "a bad name": (["--name", "../x"], 40, "name '../x' is not allowed"),
    "plain text to elsewhere": (["--insecure", "--server", "192.0.2.1:8470"], 41, "--insecure would send plain text"),
    "no such data": (["--name", "d1", "--data", "nowhere"], 20, "nowhere"),
    "one class": (["--name", "d2", "--data", "one-class"], 20, "all images of one-class are of one class, 'zero'"),
    "nobody listens": (["--server", "127.0.0.1:1", "--retry-seconds", "0"], 50, "nothing listens at 127.0.0.1:1"),
    "a newer state": (["--state", "newer", "--name", "n"], 60, "newer/client.json: written by a newer version"),
    "a damaged state": (["--state", "damaged"], 60, "damaged/client.json: damaged .not JSON"),
    "another's state": (["--state", "state/clients/client-1", "--name", "b"], 60, "belongs to client client-1, not b"),
    "another split": (
        ["--state", "state/clients/client-1", "--test-fraction", "0.3"],
        60,
        "was started with --test-fraction 0.5; another split would test on images that were trained on",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_need_no_server(home: Path, mistake: str) -> None:
    for name in ("newer", "damaged"):
        (home / name).mkdir(exist_ok=True)
    (home / "newer" / "client.json").write_text('{"format": 2}')
    (home / "damaged" / "client.json").write_text('{"format": 1')
    write_images(home / "one-class", ["zero"])
    arguments, exit_code, message = MISTAKES[mistake]
    refused(pfed_client(*arguments), exit_code, message)


def write_images(folder: Path, class_names: list[str], n_images: int = 4) -> None:
    for shade, name in enumerate(class_names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(n_images):
            Image.new("RGB", (8, 8), (40 * shade, 40 * number, 0)).save(folder / name / f"{number}.png")


SERVER_MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "another plan": (["--plan", "other.toml"], 11, "the server's plan .digest .* is not the one of --plan"),
    "other classes": (["--data", "animals"], 21, "the data has classes that the plan does not: 'cat', 'dog'"),
    "no such model": (["--pretrained", "nowhere.safetensors"], 30, "--pretrained nowhere.safetensors: no such file"),
    "no such device": (["--device", "abacus"], 30, "--device abacus: cannot be used"),
    "another model": (["--backbone", "RN50"], 31, "--backbone RN50 is not the plan's tiny-clip"),
    "a name that is taken": (["--name", "client-2", "--data", "demo:1/5"], 52, "client-2"),
    "plain text": (["--insecure"], 41, "speaks TLS, this client plain text"),
}


@pytest.mark.parametrize("mistake", SERVER_MISTAKES)
def test_mistakes_that_the_server_shows(joined: Joined, home: Path, mistake: str) -> None:
    """Found before anything is joined, except the name, which only the server can know."""
    write_images(home / "animals", ["cat", "dog"])
    (home / "other.toml").write_text('class_names = ["cat", "dog"]')
    arguments, exit_code, message = SERVER_MISTAKES[mistake]
    if "--name" not in arguments:
        arguments = ["--name", f"client-{100 + exit_code}", *arguments]
    refused(pfed_client("--server", joined.address, *arguments), exit_code, message)


def test_whether_metrics_are_shared_is_remembered(joined: Joined, home: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(joined.state, state)
    for options, shared in [([], False), (["--share-metrics"], True), ([], True), (["--no-share-metrics"], False)]:
        assert pfed_client("--server", joined.address, "--state", state, *options).exit_code == 0
        assert json.loads((state / "client.json").read_text())["settings"]["share_metrics"] is shared


@pytest.fixture
def plain_text_server() -> Iterator[Callable[[Plan], tuple[Address, list[str]]]]:
    """Starts a server that shows a plan; returns where, and the list of all calls that reach it."""
    servers: list[grpc.Server] = []

    def start(plan: Plan) -> tuple[Address, list[str]]:
        calls: list[str] = []

        class Listening(grpc.ServerInterceptor):  # type: ignore[misc]
            def intercept_service(self, continuation: Any, details: Any) -> Any:
                calls.append(details.method.rpartition("/")[2])
                return continuation(details)

        class Federation(FederationServicer):
            def GetPlan(self, request: Any, context: Any) -> fed.GetPlanReply:
                return fed.GetPlanReply(plan_json=plan.to_json(), plan_digest=plan.digest(), federation_id="f" * 32)

        server = grpc.server(ThreadPoolExecutor(1), interceptors=[Listening()])
        add_FederationServicer_to_server(Federation(), server)  # type: ignore[no-untyped-call]
        address = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        server.start()
        servers.append(server)
        return address, calls

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.mark.parametrize(
    "unprotected",
    [{}, {"aggregation": "plain"}, {"experts": "plain", "matching": "random"}],
)
def test_protections_that_take_a_certificate_are_not_had_without(
    plain_text_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unprotected: dict[str, str]
) -> None:
    """Told before anything is computed; nothing is sent, and nothing is remembered but whose directory it is."""
    monkeypatch.chdir(tmp_path)
    demo = Plan.from_toml(DEMO_PLAN)
    protection = demo.protection.model_copy(update=unprotected)
    address, calls = plain_text_server(demo.model_copy(update={"protection": protection}))
    result = pfed_client("--insecure", "--server", address, "--retry-seconds", 0)
    refused(result, 70, r"protection\.\w+ = .* takes certificates: use TLS, or a plan that asks for .plain")
    assert len(result.stderr.splitlines()) == 1
    assert calls == ["GetPlan"]
    assert sorted(path.name for path in Path("state/clients/client-1").iterdir()) == ["client.json", "lock"]
    record = json.loads(Path("state/clients/client-1/client.json").read_text())
    assert (record["name"], record["plan"], record["federation_id"], record["settings"]) == ("client-1", *[None] * 3)


def test_an_identity_without_the_cohorts_secret_is_told_before_anything_is_computed(
    joined: Joined, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(home / "peers" / "client-3" / "identity", tmp_path / "identity")
    (tmp_path / "identity" / "cohort.json").unlink()
    result = pfed_client(
        "--server", joined.address, "--identity", tmp_path / "identity", "--state", tmp_path / "s", "--data", "demo:2/5"
    )
    refused(result, 40, "identity holds no cohort secret: have its request approved again")
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["client.json", "lock"]


def test_a_truncated_model_is_named_and_left_alone(joined: Joined, home: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(joined.state, state)
    model = state / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    damage = "model.safetensors: the saved model is damaged"
    refused(pfed_client("--server", joined.address, "--state", state), 60, damage)
    refused(pfed_client("evaluate", "--state", state), 60, damage)
    assert model.stat().st_size == 100


def test_the_state_of_another_federation(joined: Joined, home: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    shutil.copytree(joined.state, state)
    record = json.loads((state / "client.json").read_text())
    (state / "client.json").write_text(json.dumps(record | {"federation_id": "0" * 32}))
    refused(pfed_client("--server", joined.address, "--state", state), 60, "belongs to federation 000000000000")
    plan = record["plan"] | {"seed": 99}
    (state / "client.json").write_text(json.dumps(record | {"plan": plan}))
    refused(pfed_client("--server", joined.address, "--state", state), 11, "is not the one that .* agreed to")


def test_without_an_authority_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = (
        "holds no certificate of client-1 .* run `pfed pki request state/clients/client-1/identity --name client-1"
    )
    refused(pfed_client(), 40, message)


def test_names_and_shares_of_clients_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """client-1, unless a process is client-1 just now; the demo has five shares."""
    monkeypatch.chdir(tmp_path)
    ensure_development_pki()
    unreachable = ("--server", "127.0.0.1:1", "--retry-seconds", 0)
    with ClientState(Path("state/clients/client-1")):
        refused(
            pfed_client(*unreachable, "--state", "state/clients/client-1", "--name", "client-1"), 61, "another client"
        )
        assert pfed_client(*unreachable).exit_code == 50
    assert sorted(path.name for path in Path("state/clients").iterdir()) == ["client-1", "client-2"]
    result = pfed_client(*unreachable, "--name", "hospital")
    assert result.exit_code == 2
    assert "give --data: only client-1, client-2, ... have images without it" in result.stderr
    result = pfed_client(*unreachable, "--state", "new")
    assert result.exit_code == 2
    assert "new is a new state directory: say with --name" in result.stderr
    result = pfed_client("--insecure", "--identity", "x")
    assert result.exit_code == 2


def test_help_and_early_mistakes_load_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pfed_client.cli import main\n"
        "heavy = {'torch', 'open_clip', 'grpc', 'sklearn'}\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, sorted(heavy & set(sys.modules)))"
    )

    def loaded(*arguments: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return run.stdout.splitlines()[-1]

    assert loaded("--help") == "0 []"
    assert loaded("--dp-epsilon", "inf") == "2 []"
    ensure_development_pki(tmp_path / "certs" / "dev")
    assert loaded("--server", "127.0.0.1:1", "--retry-seconds", "0") == "50 ['grpc', 'sklearn']"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_stop(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    ensure_development_pki(tmp_path / "certs" / "dev")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with subprocess.Popen(
        [sys.executable, "-m", "pfed_client", "--server", address], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline().startswith(f"nothing listens at {address}")
        client.send_signal(number)
        assert client.wait(timeout=20) == exit_code
    ClientState(tmp_path / "state" / "clients" / "client-1").close()  # nobody holds it any more
