"""The benchmark of load: rows, bars and table from known runs, errors that are planted, and a small crowd over TLS."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pfed_benchmarks.contract import Outcome, Report
from pfed_benchmarks.crowd.gathering import Phase, Run, plan_of, wrong_sums
from pfed_benchmarks.crowd.probing import Probes
from pfed_benchmarks.crowd.timing import FINISHED, Seen, between, call_rows, place
from pfed_benchmarks.crowd.trainer import CHANGE, SeededTrainer, expected_prompts
from pfed_benchmarks.crowd.worker import ClientSeen, Result
from pfed_benchmarks.load import bars, command, errors_of, rows_of, small_calls
from pfed_benchmarks.tables import table_of

from pfed_server.sql_store import SqlStore
from pfed_server.store import Closing
from pfedsecure.errors import NotAMember, ServerUnreachable
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import operations_pb2 as ops

NAMES = ("client-0001", "client-0002", "client-0003")


def run_of(clients: int, *, kill_in: int | None = None) -> Run:
    """Three rounds of ten seconds, in the last of which the server was killed, where one was, at second 125."""
    phase = Phase("all", clients, 3, 1, 30.0, kill_in=kill_in)
    places = {place(number, step): 90.0 + 10 * number + step for number in (1, 2, 3) for step in (1, 2, 3, 4, 5)}
    # 30 calls of 10, 20, ... 300 ms, one a second from second 101 on, and one that was under way at the kill and after
    # the server was started again. The first answer of that server is to a call that began at second 126.
    heartbeats = [(100.0 + number, number / 100) for number in range(1, 31)]
    return Run(
        phase,
        plan_of(phase),
        results=[
            Result(
                calls={"heartbeat": heartbeats, "get_plan": [(1.0, 9.0)], "submit_step": [(124.0, 1.8)]},
                places=places | {FINISHED: 131.0},
                clients={
                    f"client-{number:04d}": ClientSeen(began=2.0, joined=4.0 + number, borrowed={1: 0, 2: 9, 3: 9})
                    for number in range(1, clients + 1)
                },
            )
        ],
        rounds=[
            ops.GetStatusReply.Round(number=number, outcome="closed", cohort=clients, updates=clients, seconds=10.0)
            for number in (1, 2, 3)
        ],
        probes=Probes(calls={"heartbeat": heartbeats, "get_plan": [(1.0, 9.0)]}),
        began=0.0,
        ended=140.0,
        killed=None if kill_in is None else 125.0,
        started_again=None if kill_in is None else 125.5,
        operator_answered=None if kill_in is None else 130.0,
        server_mib=300.0 if kill_in else 500.0,
        server_cpu_seconds=33.0,
        descriptors=clients + 20,
    )


def test_bars_have_their_limits_at_full_size_alone() -> None:
    found = bars(run_of(200), run_of(1000, kill_in=3))
    assert {name: (bar.value, bar.limit, bar.ok) for name, bar in found.items() if name != "joins_a_second"} == {
        "clients_joined": (1000.0, 1000, True),
        "round_errors": (0.0, 0.0, True),
        "server_mib": (500.0, 2048.0, True),
        "small_rpc_p99_ms_200": (pytest.approx(297.1), 250.0, False),
        "recovery_seconds": (pytest.approx(1.26), 5.0, True),
        "rounds_a_minute": (6.0, None, True),
    }
    assert found["joins_a_second"].value == pytest.approx(1000 / 1002, abs=0.1)
    small = bars(run_of(12), run_of(12, kill_in=3))
    assert [small[name].limit for name in ("clients_joined", "small_rpc_p99_ms_200")] == [None, None]
    assert small["round_errors"].limit == 0


def test_with_a_single_round_it_is_the_other_server_that_is_killed() -> None:
    found = bars(run_of(200, kill_in=3), run_of(1000))
    assert found["recovery_seconds"].value == pytest.approx(1.26)
    assert found["small_rpc_p99_ms_200"].value == pytest.approx(237.7)  # nothing from the kill on
    assert found["rounds_a_minute"].value == pytest.approx(6.0)


def test_small_calls_are_those_of_open_rounds() -> None:
    assert small_calls(run_of(200)) == pytest.approx([10.0 * number for number in range(1, 31)])  # not the first plan


def test_calls_count_until_the_kill_and_steps_have_their_seconds() -> None:
    rows = rows_of(run_of(20, kill_in=3))
    calls = {str(row["method"]): row["calls"] for row in rows if row["what"] == "call"}
    assert calls == {"heartbeat": 24, "get_plan": 1, "small call: heartbeat": 24}
    steps = [(row["train and advertise"], row["unmask"]) for row in rows if row["what"] == "round"]
    assert steps == [(1.0, 6.0), (1.0, 6.0), (1.0, 6.0)]
    (recovery,) = [(row["seconds"], row["operator_seconds"]) for row in rows if row["what"] == "recovery"]
    assert recovery == (1.26, 5.0)


def test_everything_that_goes_wrong_is_an_error() -> None:
    assert errors_of(run_of(20, kill_in=3)) == []
    run = run_of(20)
    first, second, third = (run.results[0].clients[name] for name in NAMES)
    first.errors.append("ServerUnreachable: gone")
    run.probes.errors.append("a small call of client-0001: ServerUnreachable: gone")
    second.borrowed[2] = 8
    third.borrowed[1] = 0  # nothing is lent in the first round
    run.rounds[0].updates = 18
    run.rounds[1].outcome = "abandoned"
    del run.rounds[2]
    run.wrong_sums = [1]
    assert errors_of(run) == [
        "client-0001: ServerUnreachable: gone",
        "client-0002: borrowed 8 of 9 experts in round 2",
        "a small call of client-0001: ServerUnreachable: gone",
        "round 1 lacks the update of a client",
        "round 1 lacks the update of a client",
        "round 2 is abandoned",
        "round 1 ended with another sum than that of its clients",
        "a round is missing",
    ]


def test_a_sum_that_lacks_one_client_is_found(tmp_path: Path) -> None:
    run = run_of(len(NAMES))
    expected = expected_prompts(run.plan, NAMES, 3)
    trainers = [SeededTrainer(run.plan, name) for name in NAMES]
    start = trainers[0].initial_context()
    weights = [trainer.n_train for trainer in trainers]
    assert len(set(weights)) == 3
    by_hand = start
    for number in (1, 2):
        models = [
            t.train_round(t.new_model(), by_hand, np.zeros((0, 16, 512), np.float32), number)[0] for t in trainers
        ]
        by_hand = np.average([model.context for model in models], axis=0, weights=weights).astype(np.float32)
        np.testing.assert_allclose(expected[number], by_hand, atol=1e-6)
    assert float(by_hand.std()) > CHANGE / 2

    store = SqlStore.open(tmp_path / "state", run.plan)
    lacking = sum(t.n_train * t.change(2) for t in trainers[:2]) / sum(weights[:2]) + expected[1]
    for number, prompt in ((1, expected[1]), (2, lacking), (3, expected[3])):
        store.open_round(number, 0.0, 1.0, [])
        content = to_tensor(prompt.astype(np.float32)).SerializeToString()
        store.close_round(number, 1.0, Closing(content), {})
    store.close()
    assert wrong_sums(run, NAMES, tmp_path / "state") == [2]


class Slow:
    """A server that takes its time, refuses one caller, and is not there for another."""

    async def heartbeat(self, request: fed.HeartbeatRequest) -> fed.HeartbeatReply:
        await asyncio.sleep(0.05)
        if request.instance_id == "other":
            raise NotAMember("other")
        if request.instance_id == "gone":
            raise ServerUnreachable("gone")
        return fed.HeartbeatReply(round=7)

    async def await_view(self, request: fed.AwaitRequest) -> fed.FederationView:
        return fed.FederationView(phase=fed.FEDERATION_PHASE_ROUND_OPEN, round=2, step=3)


async def test_calls_are_timed_when_they_are_answered_be_it_with_a_refusal() -> None:
    seen = Seen()
    api = seen.timed(Slow())  # type: ignore[arg-type]
    assert (await api.heartbeat(fed.HeartbeatRequest())).round == 7
    with pytest.raises(NotAMember):
        await api.heartbeat(fed.HeartbeatRequest(instance_id="other"))
    with pytest.raises(ServerUnreachable):
        await api.heartbeat(fed.HeartbeatRequest(instance_id="gone"))
    given_up = asyncio.create_task(api.heartbeat(fed.HeartbeatRequest()))
    await asyncio.sleep(0.01)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await api.await_view(fed.AwaitRequest())
    assert list(seen.places) == ["2.3"]
    (row,) = call_rows("all", {"heartbeat": between(seen.calls, 0.0, 1e12)["heartbeat"]})
    assert row["calls"] == 2
    assert 45 < float(str(row["p50_ms"])) <= float(str(row["p99_ms"])) <= float(str(row["max_ms"]))


def test_the_table_has_both_federations() -> None:
    probed, everybody = run_of(200), run_of(1000, kill_in=3)
    rows = [row for run in (probed, everybody) for row in rows_of(run)]
    for row in rows[: len(rows_of(probed))]:
        row["phase"] = "small calls"
    params = {
        "load_before": 1.5,
        "load_after": 2.5,
        "processes": 4,
        "graph": "sparse, k = 150, t = 73",
        "clients": 1000,
    }
    table = table_of(Report.of("load", Outcome(params=params, rows=rows, bars=bars(probed, everybody))))
    assert "load 1.5 before and 2.5 after" in table
    assert "| all | 1,000 | 1 | 300 | 33 | 140 | 1020 | 0 |" in table
    assert "| all | 3 | 1000 of 1000 | 10 | 0 | 0 | 1 | 1 | 1 | 1 | 6 |" in table
    assert "| `heartbeat` | 24 / 125 / 238 / 240 | 30 / 155 / 297 / 300 |" in table
    assert "- `small_rpc_p99_ms_200`: 297 (<= 250: missed)" in table


@pytest.mark.slow
def test_a_small_crowd_goes_through_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    result = CliRunner().invoke(command, ["--quick", "--clients", "11", "--json", str(file)])
    assert result.exit_code == 0, result.output
    report = Report.model_validate(json.loads(file.read_bytes()))
    assert report.bars["clients_joined"].value == 11
    assert report.bars["round_errors"].value == 0, [
        row["first_error"] for row in report.rows if row["what"] == "server"
    ]
    assert 0 < report.bars["recovery_seconds"].value < 60
    servers = [row for row in report.rows if row["what"] == "server"]
    assert [row["phase"] for row in servers] == ["small calls", "all"]
    assert all(int(str(row["descriptors"])) > 11 for row in servers)  # a connection each
    probes = {row["method"]: row["calls"] for row in report.rows if str(row.get("method")).startswith("small call:")}
    assert set(probes) == {"small call: heartbeat", "small call: get_plan"}
    methods = {row["method"] for row in report.rows if row["what"] == "call" and row["phase"] == "all"}
    assert {"join", "match", "get_experts", "publish_expert", "get_step_request", "submit_step"} <= methods
    assert "| all | 3 | 11 of 11 |" in table_of(report)
