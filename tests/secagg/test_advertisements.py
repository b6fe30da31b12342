"""Advertisements and rosters: who is believed, and for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding

from pfedsecure.errors import IdentityError, MessageRejected
from pfedsecure.pki.authority import Authority
from pfedsecure.secagg import Certificates, ClientRound, Credentials, ServerRound, Step, messages
from pfedsecure.secagg.roster import (
    check_distinct,
    open_advertisement,
    read_advertisement,
    read_roster,
    write_advertisement,
    write_roster,
)
from pfedsecure.wire.v1 import secagg_pb2 as wire

NewRound = Callable[..., Any]


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
    advertisement = wire.Advertisement.FromString(done.stored[Step.ADVERTISE]["c00"])
    for name, value in fields.items():
        setattr(advertisement, name, value)
    data = messages.serialised(advertisement)
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


def test_an_accepted_client_whose_certificate_ends_keeps_nobody_out(new_round: NewRound) -> None:
    """While the step is open; the server may have been started again since it came."""
    this = new_round(3)
    expired, now = this.consortium.now + timedelta(days=10, seconds=1), this.consortium.now
    longer = this.consortium.client("longer", days=20)
    late = ClientRound.begin(this.setting, longer, this.consortium.certificates, save=lambda state: None).reply
    stored = {Step.ADVERTISE: {name: client.reply for name, client in this.clients.items()}}
    for judge in (this.consortium.certificates, Certificates(this.consortium.authority.certificate)):
        ServerRound(this.setting, judge, stored).check(Step.ADVERTISE, "longer", late, expired)
        with pytest.raises(MessageRejected, match="client c00 expired"):
            ServerRound(this.setting, judge, stored).check(Step.ADVERTISE, "c00", this.clients["c00"].reply, expired)
    stranger = Certificates(Authority.create(this.consortium.folder / "stranger", "strangers", now=now).certificate)
    with pytest.raises(MessageRejected, match="was not issued by authority"):
        open_advertisement(late, stranger, None)


def test_whose_certificate_ends_before_the_round_may_does_not_get_in(new_round: NewRound) -> None:
    """Otherwise all clients would refuse the roster because of it, once their clocks are past that time."""
    this = new_round(3)
    this.stored[Step.ADVERTISE] = {}
    now, ends = this.consortium.now, this.consortium.now + timedelta(days=10)
    check = partial(this.server.check, Step.ADVERTISE, "c00", this.clients["c00"].reply)
    check(now, over=ends)
    with pytest.raises(MessageRejected, match=r"of c00, or its authority's, ends on 2030-01-11 00:00 UTC, before the"):
        check(now, over=ends + timedelta(seconds=1))
    check(ends - timedelta(seconds=1))


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
