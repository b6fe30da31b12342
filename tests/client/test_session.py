"""A session in a real federation: what it trains, keeps and sends, and how it takes rounds that end without it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pfedsecure
from pfed_client.agreement import agree
from pfed_client.local_model import LocalModel
from pfed_client.metrics import MetricsLog
from pfed_client.state import ClientState
from pfedsecure.errors import MessageRejected, NameTaken, NotAMember, PlanError, StateError
from pfedsecure.matching.plain import PlainClientMatching
from pfedsecure.plan import Plan
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.expert_pb2 import PlainExpert
from pfedsecure.wire.v1.payload_pb2 import PlainContribution, Publication


def records(it: Any, name: str) -> list[Any]:
    return MetricsLog(it.folder / name / "metrics.jsonl").read()


def result(it: Any, name: str) -> dict[str, Any]:
    return json.loads((it.folder / name / "result.json").read_text())


async def test_clients_train_every_round_and_keep_their_own_model(federation: Any, make_trainer: Any) -> None:
    trainers = {"a": make_trainer("a", n_train=3), "b": make_trainer("b", n_train=5)}
    async with federation() as it:
        accuracies = await asyncio.gather(*(it.run(name, trainer=trainer) for name, trainer in trainers.items()))
        models = {name: it.model(name) for name in trainers}
        for (name, trainer), accuracy in zip(trainers.items(), accuracies, strict=True):
            assert trainer.trained == [1, 2, 3]
            assert [record.round for record in records(it, name)] == [1, 2, 3]
            assert [record.n_experts for record in records(it, name)] == [0, 1, 1]
            assert models[name].trained_round == 3
            assert accuracy == trainer.evaluate(models[name]) == records(it, name)[-1].test_accuracy
            assert result(it, name) == {
                "method": "pfedmoap",
                "rounds_completed": 3,
                "trained_round": 3,
                "test_accuracy": accuracy,
                "n_train": trainer.n_train,
            }
        mean = (3 * models["a"].context.astype(float) + 5 * models["b"].context.astype(float)) / 8
        np.testing.assert_allclose(it.global_prompt(), mean, rtol=1e-6)
        # The expert of the last round is what the other published in the round before.
        for name, other in (("a", "b"), ("b", "a")):
            assert models[name].experts.shape == (1, 2, 3)
            assert not np.array_equal(models[name].experts[0], models[other].context)


async def test_the_first_round_starts_from_the_plan_and_later_ones_from_the_global_prompt(
    federation: Any, make_trainer: Any, make_plan: Callable[..., Plan]
) -> None:
    """The trainer's formula, evaluated here by hand on the weighted means of what was sent."""
    trainers = {"a": make_trainer("a", n_train=1), "b": make_trainer("b", n_train=2)}
    async with federation(make_plan(rounds__count=2, mixture__experts=0)) as it:
        await asyncio.gather(*(it.run(name, trainer=trainer) for name, trainer in trainers.items()))
        models = {name: make_trainer(name).new_model() for name in trainers}
        start = make_trainer("a").initial_context()
        for number in (1, 2):
            models = {
                name: make_trainer(name).train_round(models[name], start, models[name].experts, number)[0]
                for name in trainers
            }
            total = models["a"].context.astype(float) + 2 * models["b"].context.astype(float)
            start = (total / 3).astype(np.float32)
        for name in trainers:
            np.testing.assert_allclose(it.model(name).context, models[name].context, rtol=1e-6)


async def test_what_is_sent_and_how_it_is_counted(federation: Any, around: Any, make_trainer: Any) -> None:
    """Decoded here without the client's own code; the gate is in none of it."""
    sent: dict[str, list[bytes]] = {"query": [], "update": [], "publication": []}
    received: list[int] = []
    async with federation() as it:
        api = it.api("a")

        async def match(request: Any) -> Any:
            sent["query"].append(request.query)
            answer = await api.match(request)
            received.append(len(answer))
            return answer

        async def get_experts(number: int, ids: Any) -> Any:
            experts = await api.get_experts(number, ids)
            received.append(sum(map(len, experts.values())))
            return experts

        async def get_global_prompt(number: int) -> bytes:
            prompt = await api.get_global_prompt(number)
            received.append(len(prompt))
            return prompt

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            sent["update"].append(content)
            return await api.submit_step(number, step, content)

        async def publish_expert(number: int, content: bytes) -> Any:
            sent["publication"].append(content)
            return await api.publish_expert(number, content)

        watched = around(
            api,
            match=match,
            get_experts=get_experts,
            get_global_prompt=get_global_prompt,
            submit_step=submit_step,
            publish_expert=publish_expert,
        )
        await asyncio.gather(it.run("a", api=watched, trainer=make_trainer("a", n_train=7)), it.run("b"))
        context = it.model("a").context
        update = PlainContribution.FromString(sent["update"][-1])
        assert update.weight == 7
        assert update.weighted_context == to_tensor((7 * context.astype(float)).astype(np.float32))
        publication = Publication.FromString(sent["publication"][-1])
        assert publication == Publication(
            expert=PlainExpert(context=to_tensor(context)).SerializeToString(),
            sketch=PlainClientMatching().sketch(context, 3),
        )
        log = records(it, "a")
        assert sum(record.bytes_up for record in log) == sum(len(content) for part in sent.values() for content in part)
        assert sum(record.bytes_down for record in log) == sum(received)
        gate = it.model("a").gate["W"].tobytes()
        assert not any(gate[:8] in content for part in sent.values() for content in part)


async def test_the_query_is_the_own_newest_prompt(federation: Any, around: Any) -> None:
    queries: list[bytes] = []
    contexts: list[LocalModel] = []
    async with federation() as it:
        api = it.api("a")

        async def match(request: Any) -> Any:
            queries.append(request.query)
            return await api.match(request)

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            contexts.append(it.model("a"))  # saved before anything of it is sent
            return await api.submit_step(number, step, content)

        await asyncio.gather(it.run("a", api=around(api, match=match, submit_step=submit_step)), it.run("b"))
    sketch = PlainClientMatching().sketch
    assert [model.trained_round for model in contexts] == [1, 2, 3]
    assert queries == [
        sketch(np.full((2, 3), 0.25, np.float32), 0),
        sketch(contexts[0].context, 1),
        sketch(contexts[1].context, 2),
    ]


async def test_promptfl_ends_with_the_shared_prompt(federation: Any, make_plan: Callable[..., Plan]) -> None:
    async with federation(make_plan(method="promptfl")) as it:
        await asyncio.gather(it.run("a"), it.run("b"))
        for name in "ab":
            np.testing.assert_array_equal(it.model(name).context, it.global_prompt())
            assert result(it, name)["method"] == "promptfl"
            assert all(record.n_experts == 0 for record in records(it, name))


async def test_a_client_that_is_never_chosen_keeps_the_shared_prompt(
    federation: Any, make_plan: Callable[..., Plan], make_trainer: Any
) -> None:
    plan = make_plan(rounds__count=1, rounds__participation=0.5, rounds__minimum_cohort=1, rounds__start_clients=2)
    trainers = {name: make_trainer(name) for name in "ab"}
    async with federation(plan) as it:
        await asyncio.gather(*(it.run(name, trainer=trainer) for name, trainer in trainers.items()))
        (idle,) = (name for name, trainer in trainers.items() if not trainer.trained)
        np.testing.assert_array_equal(it.model(idle).context, it.global_prompt())
        assert result(it, idle)["trained_round"] == 0
        assert records(it, idle) == []


async def test_a_round_that_closes_during_training_is_given_up(
    federation: Any, make_plan: Callable[..., Plan], make_trainer: Any, recorder: Any
) -> None:
    """`a` is slow in round 1 only: the deadline passes, its training stops, and it takes part in round 2."""
    steps: list[tuple[int, int]] = []
    slow = make_trainer("a")

    def before_step(number: int, step: int) -> None:
        steps.append((number, step))
        if number == 1:
            it.loop_time_up.wait(10)

    slow.before_step = before_step
    plan = make_plan(rounds__count=2, rounds__minimum_cohort=1, rounds__start_clients=2, rounds__deadline_seconds=1)
    async with federation(plan) as it:
        it.loop_time_up = threading.Event()

        async def release() -> None:
            while it.store.load().last_round < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # four heartbeats
            it.loop_time_up.set()

        await asyncio.gather(it.run("a", trainer=slow, observer=recorder), it.run("b"), release())
        assert (1, 3) not in steps
        assert recorder.events[0] == ("left out", 1)
        assert 1 not in slow.trained
        assert [record.round for record in records(it, "a")] == slow.trained


async def test_an_update_that_comes_too_late_is_left_out(
    federation: Any, make_plan: Callable[..., Plan], around: Any, recorder: Any
) -> None:
    plan = make_plan(rounds__count=2, rounds__minimum_cohort=1, rounds__start_clients=2, rounds__deadline_seconds=3)
    async with federation(plan) as it:
        api = it.api("a")

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            while number == 1 and it.store.load().last_round == 1:
                await asyncio.sleep(0.01)
            return await api.submit_step(number, step, content)

        await asyncio.gather(it.run("a", api=around(api, submit_step=submit_step), observer=recorder), it.run("b"))
        assert recorder.events[:2] == [("left out", 1), ("done", 2)]
        assert it.model("a").trained_round == 2


async def test_a_refused_update_costs_the_round_and_not_the_client(federation: Any, around: Any, recorder: Any) -> None:
    async with federation() as it:
        api = it.api("a")

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            return await api.submit_step(number, step, content[:-1])

        watched = around(api, submit_step=submit_step)
        tasks = [asyncio.create_task(it.run("b")), asyncio.create_task(it.run("a", api=watched, observer=recorder))]
        while not recorder.reasons:
            await asyncio.sleep(0.01)
        assert "the update" in recorder.reasons[0]
        assert recorder.events == [("withdrew", 1)]
        assert not tasks[1].done()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert it.model("a").trained_round == 1  # nothing trained is lost


async def test_diverged_training_sends_and_keeps_nothing(federation: Any, make_trainer: Any) -> None:
    async with federation() as it:
        other = asyncio.create_task(it.run("b"))
        with pytest.raises(PlanError, match=r"diverged in round 1 .*nothing was sent.*prompt_lr"):
            await it.run("a", trainer=make_trainer("a", loss=float("nan")))
        other.cancel()
        assert it.store.load().open_round.parts["a"].message_digest is None
        assert not (it.folder / "a" / "model.safetensors").exists()
        assert records(it, "a") == []


async def test_a_session_that_is_cancelled_stops_training_and_goes_on_later(federation: Any, make_trainer: Any) -> None:
    stopped = make_trainer("a")
    async with federation() as it, federation() as undisturbed:
        task: asyncio.Task[float]

        def before_step(number: int, step: int) -> None:
            if (number, step) == (2, 2):
                task.get_loop().call_soon_threadsafe(task.cancel)
                for _ in range(5000):
                    if task.done():
                        break
                    time.sleep(0.001)

        stopped.before_step = before_step
        task = asyncio.create_task(it.run("a", trainer=stopped))
        other = asyncio.create_task(it.run("b"))
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert stopped.trained == [1]
        assert it.model("a").trained_round == 1
        await asyncio.gather(it.run("a"), other)
        await asyncio.gather(undisturbed.run("a"), undisturbed.run("b"))
        np.testing.assert_array_equal(it.global_prompt(), undisturbed.global_prompt())


async def test_a_second_process_under_the_same_name(federation: Any, tmp_path: Path) -> None:
    async with federation() as it:
        first = asyncio.create_task(it.run("a"))
        while not it.store.load().members:
            await asyncio.sleep(0.01)
        with pytest.raises(NameTaken):
            await it.run("a", folder=tmp_path / "elsewhere")
        first.cancel()


async def test_a_server_that_lost_the_federation_is_told_from_one_that_dropped_the_member(
    federation: Any, around: Any
) -> None:
    async with federation() as it, federation() as replacement:
        use = {"api": it.api("a")}
        methods = {
            name: (lambda *args, name=name: getattr(use["api"], name)(*args))
            for name in ("get_plan", "join", "await_view", "heartbeat")
        }
        task = asyncio.create_task(it.run("a", api=around(it.api("a"), **methods)))
        while not (it.folder / "a" / "client.json").exists() or "federation_id" not in (
            it.folder / "a" / "client.json"
        ).read_text().replace('"federation_id": null', ""):
            await asyncio.sleep(0.01)
        use["api"] = replacement.api("a")
        with pytest.raises(StateError, match=r"belongs to federation .*its state was lost"):
            await task
        with pytest.raises(NotAMember):
            await asyncio.gather(it.run("a"), leave_soon(it))


async def leave_soon(it: Any) -> None:
    """Take `a` out of its federation behind its back."""
    from pfedsecure.wire.v1 import federation_pb2 as fed

    await asyncio.sleep(0.1)
    member = it.store.load().members["a"]
    await it.api("a").leave(fed.LeaveRequest(instance_id=member.instance_id))


async def test_a_server_restored_from_an_older_copy(federation: Any, make_trainer: Any) -> None:
    async with federation() as it:
        other = asyncio.create_task(it.run("b"))
        with ClientState(it.folder / "a") as state:
            state.claim("a")
            agreement = await agree(it.api("a"), state)
            state.pin(agreement.plan, agreement.federation_id)
            ahead = make_trainer("a").new_model()
            model = LocalModel(ahead.context, ahead.gate, ahead.experts, trained_round=5)
            state.save_model(model, {"plan": it.plan.digest(), "backbone": "b" * 64})
        with pytest.raises(
            StateError, match=r"trained in round 5, the server is back at round 1 .*ask its operator why before you"
        ):
            await it.run("a")
        other.cancel()


async def test_a_server_that_answers_at_once_is_not_asked_all_the_time(federation: Any, around: Any) -> None:
    """`a` alone waits for a second client; heartbeats every 0.05 s make at most 20 questions a second."""
    asked = 0
    async with federation() as it:
        api = it.api("a")

        async def await_view(request: Any) -> Any:
            nonlocal asked
            asked += 1
            request.wait_seconds = 0
            await asyncio.sleep(0)  # as a network would, let others run
            return await api.await_view(request)

        task = asyncio.create_task(it.run("a", api=around(api, await_view=await_view)))
        await asyncio.sleep(0.5)
        assert not task.done()
        task.cancel()
    assert 2 <= asked <= 12


@pytest.mark.parametrize("denied", ["message of step 1", "expert"])
async def test_a_server_that_denies_what_it_confirmed(federation: Any, around: Any, denied: str) -> None:
    sent = {"message": 0, "expert": 0}
    async with federation() as it:
        api = it.api("a")

        async def await_view(request: Any) -> Any:
            view = await api.await_view(request)
            if denied == "expert":
                view.expert_received = False
            else:
                view.step_received = 0
            return view

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            sent["message"] += 1
            return await api.submit_step(number, step, content)

        async def publish_expert(number: int, content: bytes) -> Any:
            sent["expert"] += 1
            return await api.publish_expert(number, content)

        lying = around(api, await_view=await_view, submit_step=submit_step, publish_expert=publish_expert)
        with ClientState(it.folder / "b") as state:  # in the round, but never done with it
            state.claim("b")
            await it.api("b").join(join_request(it, state))
            with pytest.raises(MessageRejected, match=f"the server denies the {denied} of round 1 that it confirmed"):
                await it.run("a", api=lying)
    assert sent == {"message": 1, "expert": 1}


async def test_what_is_sent_again_counts_the_images_it_was_trained_on(
    federation: Any, around: Any, make_trainer: Any
) -> None:
    """The first session dies before its update arrives; the second has another number of images."""
    contributions: list[bytes] = []
    async with federation() as it:
        api = it.api("a")

        async def lost(number: int, step: int, content: bytes) -> Any:
            contributions.append(content)
            raise asyncio.CancelledError

        async def submit_step(number: int, step: int, content: bytes) -> Any:
            contributions.append(content)
            return await api.submit_step(number, step, content)

        other = asyncio.create_task(it.run("b"))
        with pytest.raises(asyncio.CancelledError):
            await it.run("a", api=around(api, submit_step=lost), trainer=make_trainer("a", n_train=3))
        again = around(api, submit_step=submit_step)
        await asyncio.gather(it.run("a", api=again, trainer=make_trainer("a", n_train=4)), other)
    assert contributions[0] == contributions[1]
    assert [PlainContribution.FromString(content).weight for content in contributions] == [3, 3, 4, 4]


async def test_a_diverged_gate_is_not_kept(federation: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("a")
    train_round = trainer.train_round

    def diverging(*args: Any, **options: Any) -> Any:
        model, report = train_round(*args, **options)
        return LocalModel(model.context, {"W": model.gate["W"] * np.nan}, model.experts, 1, 3), report

    monkeypatch.setattr(trainer, "train_round", diverging)
    async with federation() as it:
        other = asyncio.create_task(it.run("b"))
        with pytest.raises(PlanError, match="diverged in round 1"):
            await it.run("a", trainer=trainer)
        other.cancel()
        assert not (it.folder / "a" / "model.safetensors").exists()


def join_request(it: Any, state: ClientState) -> Any:
    from pfedsecure.wire.v1 import federation_pb2 as fed

    return fed.JoinRequest(
        plan_digest=it.plan.digest(), instance_id=state.record.instance_id, software_version=pfedsecure.__version__
    )
