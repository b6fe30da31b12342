"""`pfed status` against a real server over mutual TLS."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from pfed_cli.in_process import InProcessApi
from pfed_cli.operations import fetch_status, of_any, operator_identity
from pfed_cli.status import print_status, status, watch_status
from pfed_server.app import serving
from pfed_server.coordinator import Coordinator
from pfed_server.sql_store import SqlStore
from pfedsecure.console import Address
from pfedsecure.errors import IdentityError, InsecureTransport, PfedError, ServerUnreachable
from pfedsecure.experts.claim import make_claim
from pfedsecure.pki.author import Author
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.development import DEVELOPMENT_FOLDER, enrol, ensure_development_pki
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.installation import install_kit
from pfedsecure.pki.request import request
from pfedsecure.plan import Plan, ProtectionPlan
from pfedsecure.wire.peer import Peer
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops

PLAN = Plan.model_validate({"class_names": ["cat", "dog"], "name": "trial", "rounds": {"minimum_cohort": 4}})
UNPROTECTED = PLAN.model_copy(
    update={"protection": ProtectionPlan(aggregation="plain", experts="plain", matching="plain")}
)
SHAPE = (16, 48)


def ask(folder: Path, *arguments: str, tls: bool = True, before: str = "") -> Result:
    """The command's result in `folder`, against a server with development certificates there and one client.

    `before`: what stands before its address in --server.
    """
    plan = PLAN if tls else UNPROTECTED

    async def main() -> Result:
        with closing(SqlStore.in_memory(plan)) as store:
            identity = ensure_development_pki() if tls else None
            coordinator = Coordinator(plan, store, context_shape=SHAPE, authority=identity and identity.authority)
            async with serving(coordinator, Address("127.0.0.1", 0), identity) as address:
                if tls:
                    await join(coordinator, "alice")
                options = ["--server", f"{before}{address}", *arguments]
                return await asyncio.to_thread(CliRunner().invoke, status, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return asyncio.run(main())


async def join(coordinator: Coordinator, name: str) -> None:
    identity = enrol(Path("certs/dev"), name, "client", Path(name))
    peer = Peer.from_certificate(identity.certificate, identity.authority, datetime.now(UTC))
    api = InProcessApi(coordinator, peer)
    federation_id = (await api.get_plan()).federation_id
    claim = make_claim(Author.load(identity.folder), federation_id, identity.subject.fingerprint)
    request = fed.JoinRequest(
        plan_digest=PLAN.digest(),
        instance_id="1",
        author_certificate=claim.certificate,
        author_signature=claim.signature,
    )
    await api.join(request)


def test_json_has_every_field_with_numbers_as_numbers(tmp_path: Path) -> None:
    found = json.loads(ask(tmp_path, "--json").output)

    assert found.pop("federation_id")
    assert found == {
        "federation": "trial",
        "plan_digest": PLAN.digest(),
        "phase": "gathering",
        "round": 0,
        "rounds_completed": 0,
        "rounds_planned": 10,
        "seconds_left": 0.0,
        "transport": "mtls",
        "unprotected": list(PLAN.unprotected()),
        "members": [
            {
                "name": "alice",
                "online": True,
                "in_cohort": False,
                "step_received": 0,
                "expert_received": False,
                "last_round": 0,
                "expert_reports": 0,
            }
        ],
        "rounds": [],
        "aggregation": "secure",
        "experts": "sealed",
        "matching": "he",
        "step": 0,
    }


def test_the_table_names_what_is_not_protected(tmp_path: Path) -> None:
    output = ask(tmp_path).output

    assert "federation trial" in output
    assert "mtls" in output
    assert "gathering: round 0, 0 of 10 completed" in output
    assert [line for line in output.splitlines() if line.startswith("NOT PROTECTED: ")] == [
        f"NOT PROTECTED: {sentence}" for sentence in PLAN.unprotected()
    ]
    (row,) = [line for line in output.splitlines() if "alice" in line]
    assert row.split("│")[2].strip() == "yes"


def test_an_operator_is_told_that_its_own_certificate_ends(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        ensure_development_pki()
    folder = tmp_path / "olga"
    csr = request(folder, "olga", "operator").read_bytes()
    authority = Authority.load(tmp_path / DEVELOPMENT_FOLDER / "authority")
    install_kit(folder, authority.admit(csr, name="olga", role="operator", days=20))
    result = ask(tmp_path, "--json", "--identity", str(folder))
    assert json.loads(result.stdout)["federation"] == "trial"
    (line,) = [line for line in result.stderr.splitlines() if "certificate" in line and "operator" in line]
    assert line.startswith("the certificate of operator olga ends on 20")
    assert "certificate of operator" not in ask(tmp_path, "--json").stderr


def test_plain_text_says_so(tmp_path: Path) -> None:
    found = json.loads(ask(tmp_path, "--insecure", "--json", tls=False).output)

    assert found["transport"] == "insecure"


def test_of_several_servers_the_first_that_answers_tells(tmp_path: Path, unused_tcp_port: int) -> None:
    nobody = f"127.0.0.1:{unused_tcp_port}"
    assert ask(tmp_path, "--json").exit_code == 0
    found = ask(tmp_path, "--json", before=f"{nobody}, ")
    assert json.loads(found.output)["transport"] == "mtls"

    asked = []

    def answer(address: Address) -> str:
        asked.append(address.host)
        if address.host == "a":
            raise ServerUnreachable("a is away")
        if address.host == "b":
            raise IdentityError("b does not know you")
        return "c"

    a, b, c = (Address(host, 1) for host in "abc")
    assert of_any([a, c, b], answer) == "c"
    assert of_any([b, c], answer) == "c"  # what refuses may be going down
    with pytest.raises(IdentityError, match="b does not know you"):
        of_any([b, a], answer)
    with pytest.raises(ServerUnreachable, match="a is away"):
        of_any([a, b], answer)
    assert asked == ["a", "c", "b", "c", "b", "a", "a", "b"]


def test_a_client_is_no_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_development_pki()
    mallory = enrol(Path("certs/dev"), "mallory", "client", Path("mallory"))

    result = ask(tmp_path, "--identity", str(mallory.folder))
    assert isinstance(result.exception, IdentityError)
    assert str(result.exception) == "mallory is the identity of a client, a operator is needed: use another folder"

    async def call() -> None:
        with closing(SqlStore.in_memory(PLAN)) as store:
            coordinator = Coordinator(UNPROTECTED, store, context_shape=SHAPE)
            async with serving(coordinator, Address("127.0.0.1", 0), ensure_development_pki()) as address:
                await asyncio.to_thread(fetch_status, address, mallory)

    with pytest.raises(IdentityError, match="client mallory may not do this: it takes a certificate for a operator"):
        asyncio.run(call())


def test_no_authority_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="no development authority in"):
        operator_identity(tmp_path / "certs")


def refused(call: Callable[[], object]) -> PfedError:
    with pytest.raises(PfedError) as caught:
        call()
    return caught.value


def test_why_there_is_no_answer(tmp_path: Path, unused_tcp_port: int) -> None:
    ensure_development_pki(tmp_path)
    operator: Identity = operator_identity(tmp_path)
    nobody = Address("127.0.0.1", unused_tcp_port)

    assert isinstance(refused(lambda: fetch_status(nobody, operator)), ServerUnreachable)
    remote = refused(lambda: fetch_status(Address("192.0.2.1", 8470), None))
    assert isinstance(remote, InsecureTransport)
    assert "plain text" in str(remote)


def test_identity_and_insecure_exclude_each_other() -> None:
    result = CliRunner().invoke(status, ["--insecure", "--identity", "here"])

    assert result.exit_code == 2
    assert "--identity goes with TLS, not with --insecure" in result.output


def test_rounds_are_listed_and_a_server_cannot_steer_the_terminal() -> None:
    reply = ops.GetStatusReply(federation="[red]x[/red]\x1b[2J", phase="round open", round=2, step=3, seconds_left=12.3)
    reply.rounds.add(number=1, outcome="closed", cohort=5, updates=4, seconds=3.21, bytes_received=2048, bytes_sent=512)
    reply.rounds[0].metrics["test_accuracy"] = 0.5
    reply.rounds.add(number=2, outcome="open", cohort=5)
    output = io.StringIO()
    print_status(reply, Console(file=output, width=100, force_terminal=False))

    lines = output.getvalue().splitlines()
    assert lines[0].startswith("federation [red]x[/red] [2J (")
    assert lines[1] == "round open: round 2, 0 of 0 completed, step 3, 12 s left"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["1", "closed", "4 of 5", "3.2", "2.0", "0.5", "test_accuracy 0.500"],
        ["2", "open", "0 of 5", "–", "0.0", "0.0", "–"],
    ]


def test_watching_goes_on_while_the_server_is_away_and_ends_with_what_does_not_mend() -> None:
    replies = [
        ops.GetStatusReply(federation="trial", phase="gathering", round=1),
        ServerUnreachable("nothing listens there"),
        ops.GetStatusReply(federation="trial", phase="round open", round=20),
        IdentityError("the certificate has expired"),
    ]
    for number in range(1, 21):
        replies[2].rounds.add(number=number, outcome="closed", seconds=1.0)
    screens, pauses = [], []
    output = io.StringIO()

    def ask() -> ops.GetStatusReply:
        reply = replies.pop(0)
        if isinstance(reply, PfedError):
            raise reply
        return reply

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        screens.append(output.getvalue())
        output.truncate(0)
        output.seek(0)

    console = Console(file=output, width=100, height=60, force_terminal=True, color_system=None)
    with pytest.raises(IdentityError):
        watch_status(ask, console, 3.0, sleep)
    assert pauses == [3.0] * 3
    assert "gathering: round 1" in screens[0]
    assert "again every 3 s; Ctrl-C ends" in screens[0]
    assert "gathering: round 1" in screens[1]  # the newest that is known stays
    assert "nothing listens there; trying again" in screens[1]
    assert "round open: round 20" in screens[2]
    numbers = [line.split("│")[1].strip() for line in screens[2].splitlines() if line.startswith("│")]
    assert numbers == [str(number) for number in range(11, 21)]


def test_watch_and_json_exclude_each_other() -> None:
    result = CliRunner().invoke(status, ["--watch", "--json"])
    assert result.exit_code == 2
    assert "--watch is for people" in result.output
