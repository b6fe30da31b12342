"""A federation in one process: repeatable, and what the method says, checked against slow and obvious computations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pfed_cli.methods import Method, plan_of
from pfed_cli.scoring import score
from pfed_cli.simulation import SimulatedClient, SimulationResult, simulate, train_alone, with_privacy
from pfed_client.ledger.budget import LedgerBudget
from pfed_client.privacy import Privacy
from pfed_client.state import ClientState
from pfed_client.trainer import Trainer
from pfedsecure.aggregation.secure import parameters
from pfedsecure.clip.backbone import Backbone
from pfedsecure.errors import PlanError
from pfedsecure.plan import Plan
from pfedsecure.privacy.budget import Reservation
from pfedsecure.privacy.events import Event, SampledGaussianSteps
from pfedsecure.secagg import Encoding

MakePlan = Callable[..., Plan]
Clients = Sequence[SimulatedClient]


def contexts(result: SimulationResult) -> dict[str, np.ndarray]:
    return {name: client.model.context for name, client in result.clients.items()}


def same(one: SimulationResult, other: SimulationResult) -> bool:
    """Whether all that a federation leaves is equal to the last bit."""
    return all(
        one.accuracies == other.accuracies
        and one.clients[name].borrowed == other.clients[name].borrowed
        and np.array_equal(one.clients[name].model.context, other.clients[name].model.context)
        and np.array_equal(one.clients[name].model.experts, other.clients[name].model.experts)
        and all(np.array_equal(one.clients[name].model.gate[k], v) for k, v in other.clients[name].model.gate.items())
        for name in one.clients
    )


@pytest.mark.slow
def test_the_seed_alone_decides(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    plan = small_plan()
    first = simulate(plan, clients, backbone)

    assert same(first, simulate(plan, clients, backbone))
    assert same(first, simulate(plan, list(reversed(clients)), backbone))
    assert not same(first, simulate(small_plan(seed=2), clients, backbone))


def test_experts_are_the_nearest_prompts_of_the_round_before(
    small_plan: MakePlan, clients: Clients, backbone: Backbone
) -> None:
    after_one = contexts(simulate(small_plan(rounds__count=1), clients, backbone))
    after_two = simulate(small_plan(), clients, backbone)

    for name, client in after_two.clients.items():
        others = [other for other in after_one if other != name]
        nearest = min(others, key=lambda other: np.linalg.norm(after_one[other] - after_one[name]))
        assert client.borrowed == {2: (nearest,)}
        np.testing.assert_array_equal(client.model.experts, after_one[nearest][None])


def test_all_others_are_borrowed_from_nearest_first(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    after_one = contexts(simulate(small_plan(rounds__count=1), clients, backbone))
    after_two = simulate(small_plan(mixture__experts=9), clients, backbone)

    for name, client in after_two.clients.items():
        distances = {other: np.linalg.norm(after_one[other] - after_one[name]) for other in after_one if other != name}
        assert client.borrowed[2] == tuple(sorted(distances, key=distances.__getitem__))


@pytest.mark.slow
def test_random_experts_are_drawn_by_the_seed(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    plan = plan_of(Method.RANDOM_EXPERTS, small_plan(rounds__count=4))
    drawn = simulate(plan, clients, backbone)

    assert same(drawn, simulate(plan, clients, backbone))
    nearest = simulate(small_plan(rounds__count=4), clients, backbone)
    assert {name: client.borrowed for name, client in drawn.clients.items()} != {
        name: client.borrowed for name, client in nearest.clients.items()
    }
    assert all(name not in lenders for name, c in drawn.clients.items() for lenders in c.borrowed.values())


@pytest.mark.slow
def test_the_gate_alone_borrows_nothing(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    alone = simulate(plan_of(Method.GATE_ONLY, small_plan()), clients, backbone)
    with_experts = simulate(small_plan(), clients, backbone)

    for name, client in alone.clients.items():
        assert client.borrowed == {}
        assert [record.n_experts for record in client.rounds] == [0, 0]
        assert [record.n_experts for record in with_experts.clients[name].rounds] == [0, 1]
        assert sum(r.bytes_down for r in client.rounds) < sum(r.bytes_down for r in with_experts.clients[name].rounds)
        assert client.model.gate
        assert not np.array_equal(client.model.context, with_experts.clients[name].model.context)


def test_promptfl_ends_with_one_prompt_for_all(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    plan = plan_of(Method.PROMPTFL, small_plan(rounds__count=1))
    result = simulate(plan, clients, backbone)

    trained, weights = [], []
    for client in clients:
        trainer = Trainer(plan, backbone, client.train, client.test, name=client.name)
        model = trainer.new_model()
        trained.append(trainer.train_round(model, model.context, model.experts, 1)[0].context.astype(np.float64))
        weights.append(len(client.train))
    assert len(set(weights)) == 3
    # Secure aggregation rounds: `secagg.encoding` says by how much at most.
    agreed = parameters(plan, trained[0].shape)
    bound = Encoding.of(agreed, len(clients)).step / np.mean(weights) + 1e-7
    mean = np.average(trained, axis=0, weights=weights)
    for client in clients:
        np.testing.assert_allclose(result.clients[client.name].model.context, mean, atol=bound)
        assert result.clients[client.name].model.gate == {}
    assert score(Method.PROMPTFL, small_plan(rounds__count=1), clients, backbone) == result.accuracies


def test_training_alone_is_a_first_round_continued(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    one_round = plan_of(Method.LOCAL, small_plan(rounds__count=1))
    federated = simulate(one_round, clients, backbone)
    alone = train_alone(one_round, clients, backbone)

    assert alone == {name: client.rounds[0].test_accuracy for name, client in federated.clients.items()}
    longer = train_alone(plan_of(Method.LOCAL, small_plan(rounds__count=5)), clients, backbone)
    assert sum(longer.values()) > sum(alone.values())


def test_zero_shot_is_the_model_with_plain_words(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    """The oracle encodes whole sentences with open_clip itself."""
    import open_clip
    import torch.nn.functional as F

    found = score(Method.ZERO_SHOT, small_plan(), clients, backbone)
    plan = small_plan()
    tokens = open_clip.get_tokenizer("tiny-clip")([f"a photo of a {name}." for name in plan.class_names])
    text = F.normalize(backbone.model.encode_text(tokens), dim=-1)  # type: ignore[operator]
    for client in clients:
        predicted = (client.test.features @ text.T).argmax(dim=1)
        assert found[client.name] == (predicted == client.test.labels).double().mean().item()


def test_not_everybody_need_take_part(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    rounds = {"count": 3, "minimum_cohort": 2, "start_clients": 3, "participation": 0.5}
    plan = small_plan(rounds=rounds, protection__aggregation="plain")
    result = simulate(plan, clients, backbone)

    assert same(result, simulate(plan, clients, backbone))
    assert sum(len(client.rounds) for client in result.clients.values()) == 3 * 2


def test_the_plan_must_wait_for_all(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    with pytest.raises(PlanError, match=r"a simulation of 2 clients needs rounds.start_clients = 2, not 3"):
        simulate(small_plan(), clients[:2], backbone)


def test_one_client_that_fails_ends_all(small_plan: MakePlan, clients: Clients, backbone: Backbone) -> None:
    with pytest.raises(PlanError, match="training diverged in round"):
        simulate(small_plan(training__prompt_lr=1e30), clients, backbone)


def test_protections_change_no_more_than_the_rounding(
    small_plan: MakePlan, clients: Clients, backbone: Backbone
) -> None:
    """Sealed experts are the same experts, and the secure mean is the mean up to its documented error."""
    protected = simulate(small_plan(rounds__count=1), clients, backbone)
    plain = small_plan(rounds__count=1, protection={"aggregation": "plain", "experts": "plain", "matching": "plain"})
    for name, client in simulate(plain, clients, backbone).clients.items():
        np.testing.assert_array_equal(protected.clients[name].model.context, client.model.context)
    two_rounds = simulate(small_plan(), clients, backbone)
    for name, client in two_rounds.clients.items():
        np.testing.assert_array_equal(
            client.model.experts[0], protected.clients[client.borrowed[2][0]].model.context, err_msg=name
        )


def test_an_ensembles_experts_travel_sealed_as_they_do_plain(
    small_plan: MakePlan, clients: Clients, backbone: Backbone
) -> None:
    sealed = simulate(small_plan(mixture__form="ensemble"), clients, backbone)
    plain = simulate(small_plan(mixture__form="ensemble", protection__experts="plain"), clients, backbone)

    assert same(sealed, plain)
    (experts,) = {client.model.experts.shape for client in sealed.clients.values()}
    assert experts == (1, 3 + 4, 48)  # 10 classes x 16 numbers behind a prompt of 3 rows of 48


@pytest.mark.slow
def test_private_clients_pay_for_every_round(
    small_plan: MakePlan, clients: Clients, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them, in a federation and alone; and how many images it has is known by a noised number."""
    plan = small_plan()
    plan = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"steps": 2})})
    paid: list[int] = []
    reserve = LedgerBudget.reserve

    def counted(self: LedgerBudget, event: Event) -> Reservation:
        if isinstance(event, SampledGaussianSteps):
            paid.append(event.round)
        return reserve(self, event)

    monkeypatch.setattr(LedgerBudget, "reserve", counted)
    every = sorted(number + 1 for number in range(plan.rounds.count) for _ in clients)
    promised: dict[str, int] = {}
    prepare = with_privacy(plan, backbone, 8.0)

    def watched(client: SimulatedClient, state: ClientState) -> tuple[Trainer, Privacy | None]:
        trainer, privacy = prepare(client, state)
        assert privacy is not None
        promised[client.name] = privacy.promise.size
        return trainer, privacy

    result = simulate(plan, clients, backbone, watched)
    assert sorted(paid) == every
    assert {name: client.model.n_train for name, client in result.clients.items()} == promised
    paid.clear()
    alone = plan_of(Method.LOCAL, plan)
    assert set(train_alone(alone, clients, backbone, with_privacy(alone, backbone, 8.0))) == set(result.clients)
    assert sorted(paid) == every
