"""`pfed doctor`: each thing that can be wrong with a deployment is broken for real, and found with what to do."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from pfed_cli.doctor import client as client_checks
from pfed_cli.doctor import machine
from pfed_cli.doctor.command import doctor
from pfed_cli.doctor.findings import Finding, run
from pfed_client.ledger.rows import Opened, encode, head_of
from pfed_client.promise import Promise, PromiseFile
from pfed_client.state import Record, Settings
from pfed_server.app import serving
from pfed_server.audit import AUDIT_FILE, AuditLog
from pfed_server.cli import DEMO_PLAN
from pfed_server.clock import SystemClock
from pfed_server.coordinator import Coordinator
from pfed_server.database import DATABASE_FILE, ELSEWHERE_FILE
from pfed_server.events import left
from pfed_server.revocation import KEPT_FILE
from pfed_server.sql_store import SqlStore
from pfedsecure.clip.config import context_shape
from pfedsecure.console import Address
from pfedsecure.pki import identity as identities
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.development import enrol, ensure_development_pki
from pfedsecure.pki.revocation import RevocationList
from pfedsecure.pki.revoking import revoke
from pfedsecure.plan import Plan

PLAN = Plan.from_toml(DEMO_PLAN)
Break = Callable[[Path], object]


@pytest.fixture(autouse=True)
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with development certificates, a server's state, and a client that is enrolled."""
    monkeypatch.chdir(tmp_path)
    ensure_development_pki()
    enrol(Path("certs/dev"), "anna", "client", Path("anna/identity"))
    Path("anna").chmod(0o700)
    with closing(SqlStore.open(Path("state/server"), PLAN)), closing(AuditLog.open(Path("state/server"))) as log:
        for name in ("anna", "bert", "cleo"):
            log.record(left(name))
    return tmp_path


def examine(*arguments: str) -> tuple[int, list[Finding]]:
    result = CliRunner().invoke(doctor, [*arguments, "--json"])
    found = json.loads(result.stdout)
    findings = [Finding(**finding) for finding in found["findings"] if finding["check"] != "packages"]
    packages = [finding for finding in found["findings"] if finding["check"] == "packages"]
    if not any(finding["level"] == "wrong" for finding in packages):
        assert found["wrong"] == (result.exit_code == 1)
    return result.exit_code, findings


def wrong(findings: list[Finding], level: str = "wrong") -> list[str]:
    return [f"{finding.check}: {finding.said}" for finding in findings if finding.level == level]


def of_server(*arguments: str, port: int = 0) -> list[Finding]:
    return examine("server", "--listen", f"127.0.0.1:{port}", *arguments)[1]


def of_client(address: Address, *arguments: str) -> list[Finding]:
    return examine("client", "--state", "anna", "--server", str(address), *arguments)[1]


def garble_audit(folder: Path) -> None:
    path = folder / "state/server" / AUDIT_FILE
    path.write_bytes(path.read_bytes().replace(b"bert", b"rudi"))


def newer_schema(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "state/server" / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '99'")


def damage(folder: Path) -> None:
    path = folder / "state/server" / DATABASE_FILE
    path.write_bytes(path.read_bytes()[:4096] + bytes(len(path.read_bytes()) - 4096))


def other_key(folder: Path) -> None:
    key = folder / "certs/dev/server/identity.key"
    shutil.copy(folder / "anna/identity/identity.key", key)


def test_a_sound_server_has_nothing_wrong(deployment: Path) -> None:
    findings = of_server()
    assert wrong(findings) == []
    checks = {"certificate", "revocation", "plan", "disk", "state", "audit", "port", "descriptors"}
    assert {finding.check for finding in findings} == checks
    assert any("there is no revocation list" in said for said in wrong(findings, "warning"))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda folder: (folder / "certs/dev/server/identity.key").chmod(0o644), "certificate: key .+ chmod 600"),
        (other_key, "certificate: .+ is not the key of"),
        (lambda folder: (folder / "certs/dev/server/identity.crt").unlink(), "certificate: .+ not approved yet"),
        (garble_audit, r"audit: .+ line 3 does not follow the line before it"),
        (newer_schema, "state: .+ has schema 99, this version knows 4 to"),
        (damage, "state: .+(is damaged|cannot be read)"),
        (lambda folder: (folder / "state/server" / DATABASE_FILE).write_text("x" * 5000), "state: .+ cannot be read"),
    ],
)
def test_what_is_wrong_with_a_server_is_found(deployment: Path, breaks: Break, message: str) -> None:
    breaks(deployment)
    (said,) = wrong(of_server())
    assert re.match(message, said), said


def revoked(*names: str, days: int = 30, now: datetime | None = None) -> bytes:
    return revoke(Authority.load(Path("certs/dev/authority")), names, days=days, now=now).list.pem


def of_revocation(*arguments: str) -> list[Finding]:
    return [finding for finding in of_server("--crl", "revoked.crl", *arguments) if finding.check == "revocation"]


def test_a_sound_revocation_list_is_found_so(deployment: Path) -> None:
    Path("revoked.crl").write_bytes(revoked("anna"))
    (found,) = of_revocation()
    assert (found.level, "has 1 certificates; the next is due by" in found.said) == ("ok", True)
    Path("state/server", KEPT_FILE).write_bytes(Path("revoked.crl").read_bytes())
    assert [finding.level for finding in of_revocation()] == ["ok", "ok"]
    with closing(SqlStore.open(Path("state/server"), PLAN)):  # its server runs
        assert [finding.level for finding in of_revocation()] == ["ok", "ok"]


def garbled(folder: Path) -> None:
    good = (folder / "revoked.crl").read_bytes()
    (folder / "revoked.crl").write_bytes(good[:100] + (b"A" if good[100:101] != b"A" else b"B") + good[101:])


def of_another_authority(folder: Path) -> None:
    (folder / "revoked.crl").write_bytes(revoke(Authority.create(folder / "other", "other"), []).list.pem)


def rolled_back(folder: Path) -> None:
    (folder / "state/server" / KEPT_FILE).write_bytes(revoked("anna"))


def of_the_same_number(folder: Path) -> None:
    """By somebody who has the authority's key, or by an authority that was copied."""
    authority, now = Authority.load(folder / "certs/dev/authority"), datetime.now(UTC)
    given = RevocationList.read((folder / "revoked.crl").read_bytes(), authority.certificate, "it")
    other = authority.sign_list(given.number, {5: now}, (now, now + timedelta(days=1)))
    (folder / "state/server" / KEPT_FILE).write_bytes(other.pem)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda folder: (folder / "revoked.crl").unlink(), "cannot read revoked.crl: No such file"),
        (garbled, "revoked.crl is no(t signed by| revocation list)"),
        (of_another_authority, "revoked.crl is not signed by this federation's authority"),
        (rolled_back, r"revoked.crl is list \d+, the server has had list \d+, which goes on to count: ask"),
        (of_the_same_number, "revoked.crl differs from the list that the server has"),
        (lambda folder: (folder / "state/server" / KEPT_FILE).write_bytes(b"x"), "state/server/revoked.crl is no rev"),
    ],
)
def test_what_is_wrong_with_a_revocation_list_is_found(deployment: Path, breaks: Break, message: str) -> None:
    Path("revoked.crl").write_bytes(revoked())
    breaks(deployment)
    (said,) = [finding.said for finding in of_revocation() if finding.level == "wrong"]
    assert re.match(message, said), said


def test_a_list_that_is_overdue_or_not_taken_by_the_server_is_found(deployment: Path) -> None:
    old = revoked(days=1, now=datetime.now(UTC) - timedelta(days=3))
    Path("revoked.crl").write_bytes(old)
    (found,) = of_revocation()
    assert (found.level, "was due by" in found.said) == ("warning", True)
    Path("state/server", KEPT_FILE).write_bytes(old)
    Path("revoked.crl").write_bytes(revoked("anna"))
    assert [finding.level for finding in of_revocation()] == ["ok", "ok"]  # it takes it at its start
    with closing(SqlStore.open(Path("state/server"), PLAN)):
        assert "and not yet list" in next(finding.said for finding in of_revocation() if finding.level == "wrong")


def test_too_few_descriptors_for_the_connections_that_are_wanted_are_found(
    deployment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fine,) = [finding.said for finding in of_server() if finding.check == "descriptors"]
    assert fine.startswith("2048 connections fit: a process may have ")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: {resource.RLIMIT_NOFILE: (256, 1024)}[kind])
    (said,) = [said for said in wrong(of_server(), "warning") if said.startswith("descriptors")]
    assert said.startswith(
        "descriptors: only 896 callers can be connected at once: 2048 connections take 2176 file descriptors, and this "
        "process may have 1024; raise its hard limit"
    )
    assert wrong(of_server("--connections", "896")) == []
    (said,) = wrong(of_server("--connections", "897"))
    assert "897 connections take 1025 file descriptors" in said


def test_another_plan_than_the_states_is_found(deployment: Path) -> None:
    Path("other.toml").write_text(DEMO_PLAN.read_text().replace("seed = ", "seed = 7"))
    assert Plan.from_toml(Path("other.toml")) != PLAN
    (said,) = wrong(of_server("--plan", "other.toml"))
    assert said.startswith("plan: ")
    assert PLAN.digest()[:12] in said
    said = wrong(of_server("--plan", "nowhere.toml"))[0]
    assert said.startswith("plan: nowhere.toml: cannot read the plan")


def test_a_state_whose_federation_is_in_postgresql_is_not_taken_for_a_new_one(deployment: Path) -> None:
    (deployment / "state/server" / DATABASE_FILE).unlink()
    (deployment / "state/server" / ELSEWHERE_FILE).write_text("f" * 32)
    findings = of_server()
    (finding,) = [finding for finding in findings if finding.check == "state"]
    assert finding.level == "ok"
    assert finding.said.endswith("belongs to a federation in PostgreSQL")
    assert any("give --database to have it looked at" in said for said in wrong(findings, "warning"))


def test_a_taken_port_and_a_wrong_host_are_found(deployment: Path, unused_tcp_port: int) -> None:
    with socket.create_server(("127.0.0.1", unused_tcp_port)):
        (said,) = wrong(of_server(port=unused_tcp_port))
        assert said.startswith(f"port: 127.0.0.1:{unused_tcp_port}: Address already in use")
        with closing(SqlStore.open(Path("state/server"), PLAN)):  # its own server runs
            assert wrong(of_server(port=unused_tcp_port)) == []
    findings = examine("server", "--listen", "127.0.0.2:0")[1]
    assert any("not for 127.0.0.2: clients that dial" in said for said in wrong(findings, "warning"))


@pytest.mark.parametrize(("days", "message"), [(20, "expires in 20 days"), (400, None), (-2, "expired")])
def test_certificates_that_end_soon_are_found(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, days: int, message: str | None
) -> None:
    end = identities.Identity.load(Path("certs/dev/server")).subject.not_after

    class Then(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return end - timedelta(days=min(days, 364), minutes=1)

    monkeypatch.setattr("pfed_cli.doctor.identity.datetime", Then)
    monkeypatch.setattr("pfedsecure.pki.identity.datetime", Then)
    findings = [finding for finding in of_server() if finding.check == "certificate"]
    found = [finding.said for finding in findings if finding.level != "ok" and "authority" not in finding.said]
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(message, found[0])


def test_a_clock_before_the_certificate_is_found(deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return datetime(2001, 1, 1, tzinfo=UTC)

    monkeypatch.setattr("pfed_cli.doctor.identity.datetime", Then)
    monkeypatch.setattr("pfedsecure.pki.identity.datetime", Then)
    assert any("in the future: set the clock (it says 2001-01-01 00:00 UTC)" in said for said in wrong(of_server()))


def test_packages_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["click>=999", "no-such-package-of-ours>=1", "numpy>=1", 'pywin32; sys_platform == "win32"']
    found = list(machine.packages(asked))
    assert [finding.level for finding in found] == ["wrong", "wrong", "ok"]
    assert found[0].said.endswith("pip install 'click>=999'")
    assert found[2].said.startswith("1 packages")
    assert [finding.level for finding in machine.packages(asked, needed={"numpy"})] == ["wrong", "ok"]

    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    assert [finding.level for finding in machine.disk(open_to_all)] == ["ok", "ok", "warning"]
    assert list(open_to_all.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    assert next(machine.disk(open_to_all)).level == "wrong"

    def readonly(*_arguments: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.os, "open", readonly)
    said = wrong(list(machine.disk(open_to_all)))[-1]
    assert said.startswith("disk: ")
    assert "cannot be written (Read-only file system)" in said


class SkewedClock:
    """A server whose clock is wrong."""

    def __init__(self, seconds: float) -> None:
        self._clock = SystemClock()
        self._seconds = seconds

    def now(self) -> float:
        return time.time() + self._seconds

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float | None) -> None:
        await self._clock.wait(event, seconds)


def with_server(plan: Plan, ask: Callable[[Address], list[Finding]], skew: float = 0.0) -> list[Finding]:
    """What the client's doctor finds while a server runs over mutual TLS."""

    async def main() -> list[Finding]:
        with closing(SqlStore.in_memory(plan)) as store:
            identity = ensure_development_pki()
            coordinator = Coordinator(
                plan,
                store,
                context_shape=context_shape(plan, None),
                authority=identity.authority,
                clock=SkewedClock(skew),
            )
            async with serving(coordinator, Address("127.0.0.1", 0), identity) as address:
                return await asyncio.to_thread(ask, address)

    return asyncio.run(main())


def test_a_sound_client_finds_its_server(deployment: Path) -> None:
    findings = with_server(PLAN, of_client)
    assert wrong(findings) == []
    said = [f"{finding.check}: {finding.said}" for finding in findings]
    assert any(line.startswith("server: 127.0.0.1:") and "over mutual TLS" in line for line in said)
    assert f"plan: the server's plan is {PLAN.digest()}: compare it with the other members'" in said
    assert "clock: this clock and the server's differ by less than 30 s" in said


@pytest.mark.parametrize(("skew", "level"), [(300.0, "warning"), (-300.0, "warning"), (3600.0, "wrong")])
def test_a_server_with_another_clock_is_found(deployment: Path, skew: float, level: str) -> None:
    (said,) = [line for line in wrong(with_server(PLAN, of_client, skew), level) if line.startswith("clock")]
    assert f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this one" in said


def test_another_plan_or_federation_than_agreed_on_is_found(deployment: Path) -> None:
    other = PLAN.model_copy(update={"seed": 12345})
    joined = Record(format=1, name="anna", instance_id="1", plan=other, federation_id="f" * 32)
    Path("anna/client.json").write_text(joined.model_dump_json(by_alias=True))
    said = wrong(with_server(PLAN, of_client))
    assert [line.split(":")[0] for line in said] == ["plan"]
    assert f"not the one that this client agreed to ({other.digest()[:12]})" in said[0]
    (said_again,) = wrong(with_server(other, of_client))
    assert "another federation of the same plan: the server's state was lost" in said_again
    (by_file,) = [
        line for line in wrong(with_server(other, lambda a: of_client(a, "--plan", str(DEMO_PLAN)))) if "--plan" in line
    ]
    assert by_file.startswith(f"plan: it is not the one of --plan ({PLAN.digest()[:12]})")


def test_of_several_servers_each_is_asked(deployment: Path, unused_tcp_port: int) -> None:
    nobody = Address("127.0.0.1", unused_tcp_port)

    def ask(address: Address) -> list[Finding]:
        return examine("client", "--state", "anna", "--server", f"{nobody},{address}")[1]

    findings = with_server(PLAN, ask)
    assert wrong(findings) == [f"server: nothing listens at {nobody}: start pfed-server there, or correct the address"]
    assert any(finding.check == "server" and finding.level == "ok" for finding in findings)


def test_no_server_no_identity_and_no_state_are_found(deployment: Path, unused_tcp_port: int) -> None:
    nobody = Address("127.0.0.1", unused_tcp_port)
    assert wrong(of_client(nobody)) == [
        f"server: nothing listens at {nobody}: start pfed-server there, or correct the address"
    ]
    shutil.rmtree("anna/identity")
    said = wrong(of_client(nobody))
    assert [line.split(":")[0] for line in said] == ["certificate", "server"]
    Path("anna/client.json").write_text("{")
    assert any(line.startswith("state: ") for line in wrong(of_client(nobody)))


def test_a_ledger_that_is_gone_or_changed_is_found(deployment: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    (shelf / "one").mkdir(parents=True)
    first = encode(Opened(images="0" * 64), "")
    ledger = shelf / "one" / "ledger.jsonl"
    ledger.write_bytes(first)
    state = tmp_path / "anna"
    settings = Settings.of("demo:1/5", dp_epsilon=8.0)
    record = Record(format=1, name="anna", instance_id="1", settings=settings, data_fingerprint="x")
    (state / "client.json").write_text(record.model_dump_json())

    def check() -> list[str]:
        return wrong(run("ledger", lambda: client_checks.ledger(state, shelf)))

    assert "what this client promised, is gone" in check()[0]
    promise = Promise(
        epsilon=8,
        delta=1e-5,
        size=100,
        size_noise_multiplier=5,
        noise_multiplier=1,
        sample_rate=0.1,
        steps=3,
        rounds=3,
        row=head_of(first[:-1]),
    )
    (state / "privacy.json").write_text(promise.model_dump_json())
    assert PromiseFile(state / "privacy.json").read() == promise
    assert check() == []
    ledger.write_bytes(first.replace(b"0000", b"1111", 1))
    assert "has no ledger with this client's promise" in check()[0]
    ledger.write_bytes(b"garbage\n")
    assert "line 1 cannot be read" in check()[0]


def test_for_people_it_is_one_line_a_finding(deployment: Path) -> None:
    result = CliRunner().invoke(doctor, ["server", "--listen", "127.0.0.1:0"])
    lines = result.output.splitlines()
    assert all(line.split()[0] in ("ok", "warning", "wrong") for line in lines)
    assert any(line.startswith("ok      state       state/server/federation.sqlite is sound") for line in lines)
