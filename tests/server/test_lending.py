"""Experts in envelopes: under which pseudonym they are taken, when one replaces another, and who reports them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from pfed_server.publishing import SEALED_AGAIN_A_ROUND
from pfed_server.sql_store import SqlStore
from pfedsecure.errors import IdentityError, MessageRejected, NameTaken, NotAMember
from pfedsecure.experts.claim import Claim
from pfedsecure.experts.plain import write_expert
from pfedsecure.plan import Plan
from pfedsecure.wire.v1 import federation_pb2 as fed
from pfedsecure.wire.v1 import round_pb2 as rnd
from pfedsecure.wire.v1.expert_pb2 import SealedExpert
from pfedsecure.wire.v1.payload_pb2 import Publication

MakePlan = Callable[..., Plan]
NAMES = ("anna", "bert", "cleo")
SEALED = {"aggregation": "plain", "experts": "sealed", "matching": "random"}
ANEW = "bert-anew"
"""Whose author certificate bert comes back with: with keys of its own, as after a new request."""


def prompt(number: float) -> np.ndarray:
    return np.full((2, 3), number, dtype=np.float32)


@pytest.fixture
def sealed_plan(make_plan: MakePlan) -> Plan:
    return make_plan(minimum_cohort=3, deadline_seconds=5, protection=SEALED)


async def opened(driver: Any) -> None:
    await driver.join(*NAMES)
    await driver.until_round("anna", 1)


async def played(driver: Any, number: int) -> None:
    """A round in which all publish, and the next one opened."""
    await driver.until_round("anna", number)
    for name in NAMES:
        await driver.publish_sealed(name, number, prompt(number))
        await driver.submit(name, number, prompt(number))
    await driver.until_round("anna", number + 1)


async def fetched(driver: Any, name: str, number: int, author: str) -> SealedExpert:
    """The envelope that a member is given in a round."""
    expert_id = driver.members.pseudonym(author)
    experts = await driver.coordinator.get_experts(driver.members.peer(name), number, [expert_id])
    return SealedExpert.FromString(experts[expert_id])


def envelope_in(publication: bytes) -> SealedExpert:
    return SealedExpert.FromString(Publication.FromString(publication).expert)


async def test_an_envelope_is_given_out_as_it_came_under_its_authors_pseudonym(sealed_plan: Plan, drive: Any) -> None:
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        ids = await driver.nearest("anna", 2, prompt(1), 2)
        assert sorted(ids) == sorted(driver.members.pseudonym(name) for name in ("bert", "cleo"))
        expert = await fetched(driver, "anna", 2, "bert")
        assert expert == envelope_in(driver.envelope("bert", 1, prompt(1)))
        assert (expert.author, expert.round, expert.epoch) == (driver.members.pseudonym("bert"), 1, 1)
        assert (await driver.view("bert")).expert_epoch == 1


def envelope_of(good: SealedExpert, **changes: Any) -> SealedExpert:
    changed = SealedExpert()
    changed.CopyFrom(good)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


async def test_an_envelope_is_for_its_author_and_its_round(sealed_plan: Plan, drive: Any) -> None:
    async with drive(sealed_plan) as driver:
        await opened(driver)
        bert = driver.members.pseudonym("bert")
        with pytest.raises(MessageRejected, match="under another pseudonym than its author joined with"):
            await driver.publish_sealed("anna", 1, prompt(1), expert_id=bert)
        for number in (2, 0):
            with pytest.raises(MessageRejected, match=f"the expert is sealed for round {number}, not for 1"):
                await driver.coordinator.publish_expert(
                    driver.members.peer("anna"), 1, driver.envelope("anna", number, prompt(1))
                )
        good = envelope_in(driver.envelope("anna", 1, prompt(1)))
        plain = write_expert(prompt(1))
        for expert, message in (
            (plain, "not of the form of this plan|not a SealedExpert"),
            (SealedExpert(round=1, author=good.author, salt=good.salt, ciphertext=good.ciphertext), "not of the form"),
            (envelope_of(good, epoch=2**31), "not of the form"),  # more than a database of ours takes for a number
            (SealedExpert(epoch=1, round=1, author=good.author, salt=good.salt), "not of the form"),
            (SealedExpert(epoch=1, round=1, author=good.author, ciphertext=good.ciphertext), "not of the form"),
            (good.SerializeToString() * 2, "more than an envelope of this plan"),
        ):
            content = expert if isinstance(expert, bytes) else expert.SerializeToString()
            with pytest.raises(MessageRejected, match=message):
                await driver.coordinator.publish_expert(
                    driver.members.peer("anna"), 1, Publication(expert=content).SerializeToString()
                )
        with pytest.raises(MessageRejected, match="a sketch has come although experts are drawn by lot"):
            await driver.coordinator.publish_expert(
                driver.members.peer("anna"),
                1,
                Publication(expert=good.SerializeToString(), sketch=b"numbers").SerializeToString(),
            )
        assert not (await driver.view("anna")).expert_received
        longest = driver.coordinator.max_upload_bytes
        assert len(driver.envelope("anna", 2**40, prompt(1), epoch=2**31 - 1)) <= longest


async def claiming(driver: Any, name: str, claim: Claim) -> None:
    """A client joins with a claim that somebody made."""
    request = fed.JoinRequest(
        plan_digest=driver.plan.digest(),
        instance_id="1",
        author_certificate=claim.certificate,
        author_signature=claim.signature,
    )
    await driver.coordinator.join(driver.members.peer(name), request)


async def joining(driver: Any, name: str, author: str) -> None:
    """A client joins with the author certificate and key of another."""
    await claiming(driver, name, driver.claim(name, author=author))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "no author certificate"),
        ("bytes", "no author certificate"),
        ("its identity's certificate", "no author certificate"),
        ("no signature", "not claimed by its author for this client and federation"),
        ("another's certificate", "not claimed by its author"),
        ("another's claim", "not claimed by its author"),
        ("of another federation", "not claimed by its author"),
        ("of another authority", "was not issued by authority"),
    ],
)
async def test_where_experts_are_sealed_a_member_proves_its_pseudonym(
    sealed_plan: Plan, drive: Any, tmp_path: Path, case: str, message: str
) -> None:
    """Everybody has everybody's author certificate; whoever joined under another's pseudonym would lock it out."""
    async with drive(sealed_plan) as driver:
        own, victims = driver.claim("anna"), driver.claim("bert")
        claims = {
            "none": Claim(),
            "bytes": Claim(b"\xff" * 500, own.signature),
            "its identity's certificate": Claim(
                driver.members.identity("anna").certificate.public_bytes(Encoding.DER), own.signature
            ),
            "no signature": Claim(own.certificate, b""),
            "another's certificate": Claim(victims.certificate, own.signature),
            "another's claim": victims,
            "of another federation": driver.members.claim("anna", "0f" * 16),
            "of another authority": type(driver.members)(tmp_path).claim("anna", driver.federation_id),
        }
        with pytest.raises(IdentityError, match=message):
            await claiming(driver, "anna", claims[case])
        with pytest.raises(NotAMember):
            await driver.view("anna")
        await driver.join("anna", "bert")


@pytest.mark.parametrize("changes", [{}, {"experts": 0, "protection": SEALED}], ids=["plain", "no experts"])
async def test_where_they_are_not_it_brings_none(make_plan: MakePlan, drive: Any, changes: dict[str, Any]) -> None:
    async with drive(make_plan(**changes)) as driver:
        with pytest.raises(MessageRejected, match="clients bring no author certificate"):
            await joining(driver, "anna", "anna")
        await driver.join("anna")


async def test_a_pseudonym_is_one_members(sealed_plan: Plan, drive: Any) -> None:
    async with drive(sealed_plan) as driver:
        await driver.join("anna")
        for _ in range(2):
            with pytest.raises(NameTaken, match="bert brings another member's pseudonym; request a certificate"):
                await joining(driver, "bert", "anna")
        await driver.join("bert")
        with pytest.raises(NameTaken, match="bert brings another member's pseudonym"):
            await joining(driver, "bert", "anna")


async def test_who_comes_back_under_another_pseudonym_has_no_expert_in_the_pool(sealed_plan: Plan, drive: Any) -> None:
    """Nobody could verify the one published under the old one."""
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        await driver.join("bert")  # as before: nothing changes
        assert (await driver.view("bert")).expert_epoch == 1
        await joining(driver, "bert", ANEW)
        assert (await driver.view("bert")).expert_epoch == 0
        for expert_id in (driver.members.pseudonym("bert"), driver.members.pseudonym(ANEW)):
            assert await driver.coordinator.get_experts(driver.members.peer("anna"), 2, [expert_id]) == {}
        assert (await fetched(driver, "anna", 2, "cleo")).round == 1


async def test_nor_one_that_waits_for_its_round_to_close(sealed_plan: Plan, drive: Any) -> None:
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await driver.publish_sealed("bert", 1, prompt(1))
        await joining(driver, "bert", ANEW)
        assert not (await driver.view("bert")).expert_received
        for name in NAMES:
            await driver.submit(name, 1, prompt(1))
        for name in ("anna", "cleo"):
            await driver.publish_sealed(name, 1, prompt(1))
        anew = driver.members.pseudonym(ANEW)
        await driver.publish_sealed("bert", 1, prompt(1), expert_id=anew)
        await driver.until_round("anna", 2)
        assert (await fetched(driver, "anna", 2, ANEW)).author == anew


@pytest.mark.parametrize("number", [1, 2])
async def test_a_newer_epoch_replaces_an_expert_at_once(sealed_plan: Plan, drive: Any, number: int) -> None:
    """One of the round that it was trained in, and one of a later round that is closed."""
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        if number == 2:  # is abandoned
            driver.clock.advance(5)
            await driver.until_round("anna", 3)
        now = number + 1
        before = await driver.view("bert")
        receipt = await driver.publish_sealed("bert", number, prompt(5), epoch=3)
        after = await driver.view("bert")
        assert (before.expert_epoch, after.expert_epoch) == (1, 3)
        assert after.version > before.version
        assert not after.expert_received, "the open round still waits for its own"
        assert (await fetched(driver, "anna", now, "bert")).epoch == 3
        assert (await fetched(driver, "anna", now, "cleo")).epoch == 1
        assert await driver.publish_sealed("bert", number, prompt(5), epoch=3) == receipt
        for content, epoch in ((prompt(6), 3), (prompt(5), 2), (prompt(1), 1)):
            with pytest.raises(MessageRejected, match=f"round {number} is closed"):
                await driver.publish_sealed("bert", number, content, epoch=epoch)
        assert (await fetched(driver, "anna", now, "bert")) == envelope_in(
            driver.envelope("bert", number, prompt(5), epoch=3)
        )


async def test_an_expert_is_replaced_only_where_there_is_one_and_by_none_that_is_older(
    sealed_plan: Plan, drive: Any
) -> None:
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        await played(driver, 2)
        with pytest.raises(MessageRejected, match="round 1 is closed"):
            await driver.publish_sealed("bert", 1, prompt(1), epoch=9)
        with pytest.raises(MessageRejected, match="round 4 has not been opened"):
            await driver.publish_sealed("bert", 4, prompt(1), epoch=9)
        await driver.join("dora")
        with pytest.raises(MessageRejected, match="round 2 is closed"):
            await driver.publish_sealed("dora", 2, prompt(1), epoch=9)
        with pytest.raises(MessageRejected, match="dora was not chosen for round 3"):
            await driver.publish_sealed("dora", 3, prompt(1))
        assert (await fetched(driver, "anna", 3, "bert")).round == 2


async def test_in_the_open_round_too_only_a_newer_epoch_replaces(sealed_plan: Plan, drive: Any) -> None:
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        await driver.publish_sealed("bert", 2, prompt(2), epoch=2)
        receipt = await driver.publish_sealed("bert", 2, prompt(2), epoch=3)
        assert await driver.publish_sealed("bert", 2, prompt(2), epoch=3) == receipt
        for content, epoch in ((prompt(9), 3), (prompt(2), 2)):
            with pytest.raises(MessageRejected, match="bert has already published another expert in round 2"):
                await driver.publish_sealed("bert", 2, content, epoch=epoch)
        assert (await fetched(driver, "anna", 2, "bert")).round == 1, "out of sight until the round closes"
        for name in NAMES:
            await driver.submit(name, 2, prompt(2))
        for name in ("anna", "cleo"):
            await driver.publish_sealed(name, 2, prompt(2))
        await driver.until_round("anna", 3)
        expert = await fetched(driver, "anna", 3, "bert")
        assert (expert.round, expert.epoch) == (2, 3)


@pytest.mark.parametrize("number", [1, 2], ids=["lent", "not lent yet"])
async def test_who_claims_one_epoch_after_another_is_stopped(sealed_plan: Plan, drive: Any, number: int) -> None:
    """Nobody but members can tell whether there is such an epoch. Each claim wakes all of them, and is written."""
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        await driver.publish_sealed("bert", 2, prompt(2), epoch=2)
        version, taken = await driver.settled("anna"), 0
        for epoch in range(3, 40):
            with suppress(MessageRejected):
                await driver.publish_sealed("bert", number, prompt(9), epoch=epoch)
                taken += 1
        assert taken == SEALED_AGAIN_A_ROUND
        assert await driver.settled("anna") - version <= SEALED_AGAIN_A_ROUND
        for name in NAMES:
            await driver.submit(name, 2, prompt(2))
        for name in ("anna", "cleo"):
            await driver.publish_sealed(name, 2, prompt(2))
        await driver.until_round("anna", 3)
        await driver.publish_sealed("bert", 2, prompt(9), epoch=99)  # a rotation, after all
        assert (await fetched(driver, "anna", 3, "bert")).epoch == 99


async def test_nobody_goes_back_to_an_older_epoch_than_it_has_lent_in(sealed_plan: Plan, drive: Any) -> None:
    """For those who were removed since, say, or for nobody at all: members who stay have newer secrets by then."""
    async with drive(sealed_plan) as driver:
        await opened(driver)
        await played(driver, 1)
        await driver.publish_sealed("bert", 1, prompt(1), epoch=3)
        for epoch in (1, 2):
            with pytest.raises(MessageRejected, match=f"is of epoch {epoch}, bert has lent one of epoch 3 before"):
                await driver.publish_sealed("bert", 2, prompt(2), epoch=epoch)
        await driver.publish_sealed("bert", 2, prompt(2), epoch=3)
        await driver.publish_sealed("cleo", 2, prompt(2), epoch=1)  # has not installed its kit yet


async def test_a_replaced_expert_survives_a_restart(sealed_plan: Plan, drive: Any) -> None:
    store = SqlStore.in_memory(sealed_plan)
    async with drive(sealed_plan, store) as driver:
        await opened(driver)
        await played(driver, 1)
        await driver.publish_sealed("bert", 1, prompt(1), epoch=2)
    async with drive(sealed_plan, store) as driver:
        assert (await driver.view("bert")).expert_epoch == 2
        assert (await fetched(driver, "anna", 2, "bert")).epoch == 2
        with pytest.raises(MessageRejected, match="round 1 is closed"):
            await driver.publish_sealed("bert", 1, prompt(1), epoch=1)
    store.close()


async def test_in_the_clear_nothing_of_a_closed_round_is_replaced(make_plan: MakePlan, drive: Any) -> None:
    async with drive(make_plan(minimum_cohort=3)) as driver:
        await opened(driver)
        for name in NAMES:
            await driver.work(name, 1, prompt(1))
        await driver.until_round("anna", 2)
        with pytest.raises(MessageRejected, match="round 1 is closed"):
            await driver.publish("bert", 1, prompt(2))


async def reports(driver: Any) -> dict[str, int]:
    status = await driver.coordinator.get_status(driver.members.peer("olga", "operator"))
    return {member.name: member.expert_reports for member in status.members}


async def test_a_report_counts_once_for_each_who_reports(
    sealed_plan: Plan, drive: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqlStore.in_memory(sealed_plan)
    async with drive(sealed_plan, store) as driver:
        await opened(driver)
        await played(driver, 1)
        bert = driver.members.pseudonym("bert")
        report = driver.coordinator.report_expert
        for number in (2, 2, 1):
            await report(driver.members.peer("anna"), rnd.ReportExpertRequest(round=number, expert_id=bert))
        assert await reports(driver) == {"anna": 0, "bert": 1, "cleo": 0}
        await report(driver.members.peer("cleo"), rnd.ReportExpertRequest(round=2, expert_id=bert))
        for expert_id, reporter in ((bert, "bert"), ("f" * 32, "anna"), ("", "anna"), ("bert", "anna")):
            with pytest.raises(MessageRejected, match="is not another member's"):
                await report(driver.members.peer(reporter), rnd.ReportExpertRequest(round=2, expert_id=expert_id))
        with pytest.raises(NotAMember):
            await report(driver.members.peer("dora"), rnd.ReportExpertRequest(round=2, expert_id=bert))
        with pytest.raises(IdentityError, match="operator olga may not do this"):
            await report(driver.members.peer("olga", "operator"), rnd.ReportExpertRequest(round=2, expert_id=bert))
        assert await reports(driver) == {"anna": 0, "bert": 2, "cleo": 0}
        assert "anna cannot use the expert of bert, fetched in round 2" in caplog.text
    async with drive(sealed_plan, store) as driver:
        await joining(driver, "bert", ANEW)  # under whatever pseudonym, it is the same member
        assert await reports(driver) == {"anna": 0, "bert": 2, "cleo": 0}
        await report_again(driver)
        assert await reports(driver) == {"anna": 0, "bert": 2, "cleo": 0}
    store.close()


async def report_again(driver: Any) -> None:
    request = rnd.ReportExpertRequest(round=2, expert_id=driver.members.pseudonym(ANEW))
    await driver.coordinator.report_expert(driver.members.peer("anna"), request)
