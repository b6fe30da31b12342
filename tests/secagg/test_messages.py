"""Messages that are malformed, too large or out of place: refused by name, and nothing is said or changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.pki.authority import Authority
from pfedsecure.secagg import (
    Certificates,
    ClientRound,
    Credentials,
    RoundLost,
    ServerRound,
    Sharing,
    Step,
    Update,
    messages,
    result,
)
from pfedsecure.secagg.roster import (
    MAX_ADVERTISEMENT_BYTES,
    check_distinct,
    open_advertisement,
    read_advertisement,
    read_roster,
    write_advertisement,
    write_roster,
)
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]
UpdateOf = Callable[..., Update]

UPDATE = Update(np.array([0.5, -0.5, 0.25, 0.0, 1.0], np.float32), 10)


@pytest.fixture(scope="module")
def done(new_round: NewRound) -> Any:
    """A finished round of four, each client with everything that it saved."""
    this = new_round(4)
    this.run(dict.fromkeys(this.names, UPDATE))
    return this


def client_before(done: Any, step: Step) -> ClientRound:
    """c00 as it was before `step`."""
    if step is Step.SHARE:
        client = copy.copy(done.clients["c00"])
        client._state = wire.ClientRoundState.FromString(done.states["c00"][0])
        client._cohort = None
        client._save = lambda state: None
        return client
    return ClientRound.restore(
        done.states["c00"][step - 2],
        done.setting,
        done.consortium.client("c00"),
        done.consortium.certificates,
        now=done.consortium.now,
        save=lambda state: None,
    )


def ask(client: ClientRound, step: Step, request: bytes, done: Any) -> bytes:
    match step:
        case Step.SHARE:
            return client.share(request, done.consortium.now)
        case Step.MASK:
            return client.mask(request, UPDATE)
        case Step.CONFIRM:
            return client.confirm(request)
        case _:
            return client.unmask(request)


def changed(step: Step, data: bytes, **fields: Any) -> bytes:
    """The server's request for `step` with some fields replaced."""
    kinds = {
        Step.SHARE: wire.Roster,
        Step.MASK: wire.Inbox,
        Step.CONFIRM: wire.Survivors,
        Step.UNMASK: wire.Confirmation,
    }
    return messages.serialised(altered(kinds[step].FromString(data), fields))


def altered(message: Any, fields: dict[str, Any]) -> Any:
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("step", "fields", "message"),
    [
        (Step.SHARE, {"advertisements": []}, "roster has 0 clients"),
        (Step.SHARE, {"advertisements": [b"\xff"] * 3}, "an advertisement cannot be decoded"),
        (Step.SHARE, {"advertisements": [b"x" * 5000] * 3}, f"5000 bytes, at most {MAX_ADVERTISEMENT_BYTES}"),
        (Step.MASK, {"participants": b""}, "bitmap of participants has 0 bytes, expected 1"),
        (Step.MASK, {"participants": b"\x1f"}, "bitmap of participants names clients beyond the roster"),
        (Step.MASK, {"participants": b"\x0e"}, "participants do not include this client"),
        (Step.MASK, {"participants": b"\x03"}, "2 participants of a cohort of 4 are too few"),
        (Step.MASK, {"participants": b"\x07"}, "shares from clients that do not take part"),
        (Step.MASK, {"dealers": [1, 2, 9]}, "dealers of the inbox are not distinct clients"),
        (Step.MASK, {"dealers": [1, 3, 2]}, "dealers of the inbox are not distinct clients"),
        (Step.MASK, {"dealers": [0, 1, 2]}, "clients that do not take part, or from this client"),
        (Step.MASK, {"dealers": [1, 2]}, "the inbox lacks the share from c03"),
        (Step.MASK, {"sealed": b"short"}, "the inbox's sealed shares has 5 bytes, expected 300"),
        (Step.MASK, {"commitments": b""}, "the inbox's commitments has 0 bytes, expected 192"),
        (Step.MASK, {"sealed": bytes(300)}, "the share from c01 is not what it committed to"),
        (Step.CONFIRM, {"survivors": b"\x0f\x00"}, "bitmap of survivors has 2 bytes"),
        (Step.CONFIRM, {"survivors": b"\x0e"}, "survivors do not include this client"),
        (Step.CONFIRM, {"survivors": b"\x03"}, "2 survivors of a cohort of 4 are too few"),
        (Step.UNMASK, {"survivors": b"\x07"}, "other survivors than this client signed"),
        (Step.UNMASK, {"signers": [0, 1]}, "signers and signatures do not match"),
        (Step.UNMASK, {"signers": [0, 1, 2, 4]}, "signers of the confirmation are not distinct clients"),
        (Step.UNMASK, {"signatures": [b""] * 3}, "c00 did not sign these survivors"),
    ],
)
def test_requests_that_clients_refuse(step: Step, fields: dict[str, Any], message: str, done: Any) -> None:
    client = client_before(done, step)
    before = client._state.SerializeToString(deterministic=True)
    with pytest.raises(MessageRejected, match=message):
        ask(client, step, changed(step, done.server.request(step, "c00"), **fields), done)
    assert client._state.SerializeToString(deterministic=True) == before
    ask(client, step, done.server.request(step, "c00"), done)


@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_oversized_requests_are_refused_unread(step: Step, done: Any) -> None:
    with pytest.raises(MessageRejected, match="bytes, at most"):
        ask(client_before(done, step), step, bytes(20_000_000), done)


def test_a_roster_without_the_own_advertisement_is_refused(done: Any, new_round: NewRound) -> None:
    with pytest.raises(MessageRejected, match="does not hold this client's own advertisement"):
        ask(client_before(done, Step.SHARE), Step.SHARE, roster_of(new_round(4)), done)


def roster_of(this: Any) -> bytes:
    return write_roster([client.reply for client in this.clients.values()])


def test_too_few_of_the_own_holders(done: Any, new_round: NewRound, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sparse graph a quorum may take part and still not hold enough of one client's shares."""
    monkeypatch.setattr(Sharing, "of", lambda parameters, n: Sharing(n, 2 * n // 3 + 1, 2, 2))
    monkeypatch.setattr(
        Sharing, "draw_holders", lambda self, own, entropy: np.sort((own + np.array([1, 2])) % self.clients)
    )
    this = new_round(8)
    this.advertise()
    this.share([name for name in this.names if name not in ("c01", "c02")])
    with pytest.raises(MessageRejected, match="too few holders of this client's shares take part"):
        this.mask(dict.fromkeys(this.names, UPDATE), ["c00"])


# --- advertisements ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation_id": "another"}, "advertisement of c00 is for another federation"),
        ({"round": 8}, "advertisement of c00 is for round 8, this is round 7: it was replayed"),
        ({"plan_digest": "11" * 32}, "c00 follows plan 111111111111, this client plan abababababab"),
        ({"model_digest": "22" * 32}, "c00 was given model 222222222222 for this round, this client cdcdcdcdcdcd"),
    ],
)
def test_advertisements_for_something_else(changes: dict[str, Any], message: str, done: Any) -> None:
    data = write_advertisement(
        replace(done.setting, **changes), done.consortium.client("c00"), b"m" * 32, b"s" * 32, b"c" * 32
    )
    with pytest.raises(MessageRejected, match=message):
        read_advertisement(data, done.setting, done.consortium.certificates, done.consortium.now)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_key": b"short"}, "an advertised mask key has 5 bytes, expected 32"),
        ({"share_key": b""}, "an advertised share key has 0 bytes"),
        ({"seed_commitment": bytes(33)}, "an advertised seed commitment has 33 bytes"),
        ({"certificate": b"no certificate"}, "not X.509 in DER"),
        ({"signature": b"no signature"}, "not signed by it"),
        ({"federation_id": "another"}, "not signed by it"),
        ({"round": 8}, "not signed by it"),
        ({"plan_digest": bytes(32)}, "not signed by it"),
        ({"model_digest": bytes(32)}, "not signed by it"),
        ({"mask_key": b"k" * 32}, "not signed by it"),
        ({"share_key": b"k" * 32}, "not signed by it"),
        ({"seed_commitment": b"k" * 32}, "not signed by it"),
    ],
)
def test_advertisements_that_were_changed(fields: dict[str, Any], message: str, done: Any) -> None:
    data = messages.serialised(altered(wire.Advertisement.FromString(done.stored[Step.ADVERTISE]["c00"]), fields))
    with pytest.raises(MessageRejected, match=message):
        read_advertisement(data, done.setting, done.consortium.certificates, done.consortium.now)


def test_only_certified_clients_are_believed(done: Any, tmp_path: Any) -> None:
    consortium, advertisement = done.consortium, done.stored[Step.ADVERTISE]["c00"]
    operator = Credentials.of(consortium.enrol("root", "operator"))
    data = write_advertisement(done.setting, operator, b"m" * 32, b"s" * 32, b"c" * 32)
    with pytest.raises(MessageRejected, match="operator root is not a client"):
        read_advertisement(data, done.setting, consortium.certificates, consortium.now)
    with pytest.raises(MessageRejected, match="expired"):
        read_advertisement(advertisement, done.setting, consortium.certificates, consortium.now + timedelta(days=11))
    stranger = Certificates(Authority.create(tmp_path / "authority", "strangers", now=consortium.now).certificate)
    with pytest.raises(MessageRejected, match="was not issued by authority"):
        read_advertisement(advertisement, done.setting, stranger, consortium.now)


def test_an_accepted_certificate_is_judged_by_the_clock_again(done: Any) -> None:
    consortium = done.consortium
    certificate = consortium.client("c00").certificate
    judge = Certificates(consortium.authority.certificate)
    assert judge.signer(certificate, consortium.now) is judge.signer(certificate, consortium.now)
    with pytest.raises(IdentityError, match="expired"):
        judge.signer(certificate, consortium.now + timedelta(days=11))
    with pytest.raises(IdentityError, match="valid only from"):
        judge.signer(certificate, consortium.now - timedelta(days=1))


@pytest.mark.parametrize("field", ["mask_key", "share_key", "seed_commitment"])
def test_nobody_may_advertise_what_another_does(field: str, done: Any, new_round: NewRound) -> None:
    this = new_round(3)
    advertisements = {name: wire.Advertisement.FromString(client.reply) for name, client in this.clients.items()}
    copied = {name: getattr(advertisements["c01"], name) for name in ("mask_key", "share_key", "seed_commitment")}
    copied |= {name: b"o" * 31 + name[:1].encode() for name in copied if name != field}
    thief = write_advertisement(this.setting, this.consortium.client("c00"), **copied)
    this.stored[Step.ADVERTISE] = {"c01": this.clients["c01"].reply}
    with pytest.raises(MessageRejected, match="stands twice in the roster"):
        this.server.check(Step.ADVERTISE, "c00", thief, this.consortium.now)
    others = [this.clients[name].reply for name in ("c01", "c02")]
    with pytest.raises(MessageRejected, match=r"of c0[01] stands twice in the roster \(also for c0[01]\)"):
        read_roster(write_roster([thief, *others]), this.setting, this.consortium.certificates, this.consortium.now)


def test_one_certified_key_is_one_client_whatever_its_names(done: Any) -> None:
    consortium = done.consortium
    key = consortium.client("c00").key
    role = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pfedsecure:role:client")])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "alias")]))
        .add_extension(role, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate = consortium.authority.approve(
        csr.public_bytes(KeyEncoding.PEM), name="alias", role="client", days=1, now=consortium.now
    )
    alias = Credentials(certificate.public_bytes(KeyEncoding.DER), key)
    data = [
        write_advertisement(done.setting, who, *(bytes([i]) * 32 for i in range(3 * n, 3 * n + 3)))
        for n, who in enumerate((consortium.client("c00"), alias))
    ]
    opened = [open_advertisement(one, consortium.certificates, consortium.now) for one in data]
    with pytest.raises(
        MessageRejected, match=r"the certified key of alias stands twice in the roster \(also for c00\)"
    ):
        check_distinct(opened)


# --- what the server refuses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "fields", "message"),
    [
        (Step.SHARE, {"holders": [1, 2]}, "go to 2 clients, they must go to 3 others"),
        (Step.SHARE, {"holders": [0, 1, 2]}, "must go to 3 others"),
        (Step.SHARE, {"holders": [1, 1, 2]}, "the holders in the shares of c00 are not distinct"),
        (Step.SHARE, {"sealed": b"short"}, "the shares of c00 has 5 bytes, expected 300"),
        (Step.SHARE, {"commitments": b"short"}, "the commitments of c00 has 5 bytes, expected 192"),
        (Step.SHARE, {"own_commitments": b""}, "the own commitments of c00 has 0 bytes, expected 64"),
        (Step.MASK, {"vector": bytes(31)}, "the masked vector has 31 bytes, expected 32"),
        (Step.MASK, {"participants_digest": bytes(32)}, "another cohort or other participants"),
        (Step.CONFIRM, {"signature": b"nothing"}, "the signature of c00 is not for the survivors of round 7"),
        (Step.UNMASK, {"shares": bytes(36)}, "the shares that c00 gives out has 36 bytes, expected 144"),
    ],
)
def test_messages_that_the_server_refuses(step: Step, fields: dict[str, Any], message: str, done: Any) -> None:
    kinds = {
        Step.SHARE: wire.Shares,
        Step.MASK: wire.MaskedInput,
        Step.CONFIRM: wire.SurvivorSignature,
        Step.UNMASK: wire.Unmasking,
    }
    data = messages.serialised(altered(kinds[step].FromString(done.stored[step]["c00"]), fields))
    with pytest.raises(MessageRejected, match=message):
        done.server.check(step, "c00", data, done.consortium.now)


@pytest.mark.parametrize("step", list(Step))
def test_strangers_have_no_part_and_oversized_messages_are_refused(step: Step, done: Any) -> None:
    with pytest.raises(MessageRejected, match="bytes, at most"):
        done.server.check(step, "c00", bytes(1_000_000), done.consortium.now)
    if step is Step.ADVERTISE:
        with pytest.raises(MessageRejected, match="c09 sent an advertisement of c00"):
            done.server.check(step, "c09", done.stored[step]["c00"], done.consortium.now)
        return
    with pytest.raises(MessageRejected, match=f"c09 has no part in step {step.name} of round 7"):
        done.server.check(step, "c09", done.stored[step]["c00"], done.consortium.now)
    with pytest.raises(MessageRejected, match=f"c09 has no part in step {step.name} of round 7"):
        done.server.request(step, "c09")


# --- anything at all --------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` cut short, with bytes changed, put in or appended; or anything else."""
    match draw(st.sampled_from(["cut", "change", "insert", "append", "anything"])):
        case "cut":
            return data[: draw(st.integers(0, max(len(data) - 1, 0)))]
        case "change":
            place = draw(st.integers(0, len(data) - 1))
            new = draw(st.binary(min_size=1, max_size=4))
            return data[:place] + new + data[place + len(new) :]
        case "insert":
            place = draw(st.integers(0, len(data)))
            return data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:]
        case "append":
            return data + draw(st.binary(min_size=1, max_size=40))
        case _:
            return draw(st.binary(max_size=300))


FUZZ = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # on damaged certificates
@pytest.mark.parametrize("step", [Step.SHARE, Step.MASK, Step.CONFIRM, Step.UNMASK])
def test_whatever_the_server_sends_clients_refuse_it_or_answer_once(step: Step, done: Any) -> None:
    request = done.server.request(step, "c00")
    template = client_before(done, step)
    secrets = [getattr(template._state, name) for name in ("mask_key", "share_key", "seed", "shares")]
    before = template._state.SerializeToString(deterministic=True)

    @FUZZ
    @given(damaged(request))
    def check(data: bytes) -> None:
        client = copy.copy(template)
        try:
            reply = ask(client, step, data, done)
        except MessageRejected as error:
            refusal = str(error)
        else:
            assert client.step is step
            assert ask(client, step, data, done) == reply
            return
        assert client._state.SerializeToString(deterministic=True) == before
        assert not any(secret and secret.hex() in refusal for secret in secrets)

    check()


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # on damaged certificates
@pytest.mark.parametrize("step", list(Step))
def test_whatever_a_client_sends_the_server_refuses_it_or_loses_no_more_than_the_round(step: Step, done: Any) -> None:
    expected = result(done.server).mean.values.tolist()

    @FUZZ
    @given(damaged(done.stored[step]["c01"]))
    def check(data: bytes) -> None:
        try:
            done.server.check(step, "c01", data, done.consortium.now)
        except MessageRejected:
            return
        stored = {**done.stored, step: {**done.stored[step], "c01": data}}
        server = ServerRound(done.setting, done.consortium.certificates, stored)
        try:
            outcome = result(server)
        except RoundLost:
            return
        # A client may put in what it likes, within the clip: its own masked vector is the one thing it can change.
        if step is Step.MASK:
            assert np.abs(outcome.mean.values).max() <= 1 + server.encoding.error_bound(4)
        else:
            assert outcome.mean.values.tolist() == expected

    check()
