"""The whole ceremony of a deployment through `pfed pki`, and each way in which a step refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from pfed_cli.pki import pki
from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import spaced
from pfedsecure.pki.identity import Identity
from pfedsecure.pki.keys import new_private_key

Run = Callable[..., Result]


@pytest.fixture
def pfed_pki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `pfed pki` with the given words in an empty folder; `answer` is what the person types."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, answer: str = "") -> Result:
        return CliRunner().invoke(pki, words, input=answer)

    return run


def refused(result: Result) -> str:
    """The one line with which a command refused."""
    assert isinstance(result.exception, IdentityError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def shown(run: Run, folder: str) -> dict[str, object]:
    found = json.loads(run("show", folder, "--json").output)
    assert isinstance(found, dict)
    return found


def test_a_federation_in_five_steps(pfed_pki: Run) -> None:
    made = pfed_pki("init", "ca", "--federation", "hospitals")
    asked = pfed_pki("request", "fl", "--name", "fl", "--role", "server", "--host", "fl.example.org", "--host", "::1")
    key_fingerprint = str(shown(pfed_pki, "fl")["fingerprint"])
    assert spaced(key_fingerprint) in asked.output
    approved = pfed_pki("approve", "fl/identity.csr", "--authority", "ca", "--role", "server", answer="y\n")
    assert spaced(key_fingerprint) in approved.output
    assert "hosts: fl.example.org, ::1" in approved.output
    authority_fingerprint = str(shown(pfed_pki, "ca")["fingerprint"])
    assert spaced(authority_fingerprint) in made.output
    assert spaced(authority_fingerprint) in approved.output
    installed = pfed_pki("install", "fl.kit.json", "fl", "--fingerprint", authority_fingerprint)
    assert "fl is now server fl of federation hospitals, until" in installed.output
    assert Identity.load(Path("fl"), role="server").subject.fingerprint == key_fingerprint
    assert "PRIVATE" not in Path("fl.kit.json").read_text()


def test_show(pfed_pki: Run) -> None:
    pfed_pki("init", "ca", "--federation", "hospitals")
    pfed_pki("request", "a", "--name", "alice")
    request = shown(pfed_pki, "a")
    assert {key: request[key] for key in ("kind", "name", "role", "hosts")} == {
        "kind": "request",
        "name": "alice",
        "role": "client",
        "hosts": [],
    }
    pfed_pki("approve", "a/identity.csr", "--authority", "ca", "--yes", "--days", "3")
    pfed_pki("install", "alice.kit.json", "a", "--yes")
    identity = shown(pfed_pki, "a")
    authority = shown(pfed_pki, "ca")
    assert (identity["kind"], identity["name"], identity["problem"]) == ("identity", "alice", None)
    assert identity["fingerprint"] == request["fingerprint"]
    assert identity["authority_fingerprint"] == authority["fingerprint"]
    issued = authority["issued"]
    assert isinstance(issued, list)
    assert [(record["name"], record["serial"]) for record in issued] == [("alice", identity["serial"])]
    assert identity["epoch"] == authority["epoch"] == 1
    assert identity["pseudonym"] == issued[0]["pseudonym"]
    text = pfed_pki("show", "a").output
    assert f"pseudonym: {identity['pseudonym']}" in text
    assert "epoch: 1" in text
    assert f"fingerprint: {spaced(str(identity['fingerprint']))}" in text
    assert "problem: -" in text
    shown_authority = pfed_pki("show", "ca").output
    assert "  client alice, live until" in shown_authority
    assert f", author {identity['pseudonym']}" in shown_authority
    secret = json.loads(Path("a/cohort.json").read_text())["secrets"]["1"]
    for folder in ("a", "ca"):
        for options in ([], ["--json"]):
            assert secret not in pfed_pki("show", folder, *options).output


def test_show_tells_what_is_wrong_with_an_identity(pfed_pki: Run) -> None:
    pfed_pki("init", "ca", "--federation", "hospitals")
    pfed_pki("request", "a", "--name", "alice")
    pfed_pki("approve", "a/identity.csr", "--authority", "ca", "--yes")
    pfed_pki("install", "alice.kit.json", "a", "--yes")
    Path("a/identity.key").chmod(0o644)
    assert "is open to other users" in str(shown(pfed_pki, "a")["problem"])
    assert "holds no authority, identity or request: start with" in refused(pfed_pki("show", "elsewhere"))


@pytest.fixture
def requested(pfed_pki: Run) -> Run:
    """With an authority in `ca` and a request of client alice in `a`."""
    pfed_pki("init", "ca", "--federation", "hospitals")
    pfed_pki("request", "a", "--name", "alice")
    return pfed_pki


def test_approve_takes_the_fingerprint_in_any_spelling(requested: Run) -> None:
    digits = str(shown(requested, "a")["fingerprint"])
    for spelling in (digits, digits.upper(), spaced(digits), spaced(digits).replace(":", " ")):
        done = requested("approve", "a/identity.csr", "--authority", "ca", "--fingerprint", spelling)
        assert done.exit_code == 0
        assert "approved until" in done.output


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        (["--fingerprint", "00"], "y\n", "the fingerprint is not the one that you gave: nothing was done"),
        (["--fingerprint", "00", "--yes"], "", "the fingerprint is not the one that you gave"),
        ([], "n\n", "fingerprint not confirmed: nothing was done"),
        (["--role", "operator"], "y\n", "asks for role client: if that is right, approve it with --role client"),
        (["--days", "4000", "--yes"], "", "the authority itself ends on"),
    ],
)
def test_a_refused_approval_leaves_no_kit_and_no_record(
    requested: Run, options: list[str], answer: str, message: str
) -> None:
    result = requested("approve", "a/identity.csr", "--authority", "ca", *options, answer=answer)
    assert message in refused(result)
    assert not Path("alice.kit.json").exists()
    assert Authority.load(Path("ca")).issued() == []


def admit(run: Run, folder: str, name: str, *options: str) -> None:
    """Takes a client through request, approval and installation."""
    run("request", folder, "--name", name)
    assert run("approve", f"{folder}/identity.csr", "--authority", "ca", "--yes", *options).exit_code == 0
    assert run("install", f"{name}.kit.json", folder, "--yes").exit_code == 0


def test_a_client_leaves(requested: Run) -> None:
    for folder, name in (("a", "alice"), ("b", "bob"), ("m", "mallory")):
        admit(requested, folder, name)
    done = requested("rotate", "ca", "--kits", "kits", "--without", "mallory")
    assert "epoch 2 begins; send each kit to its client" in done.output
    assert "  kits/alice.kit.json to alice\n  kits/bob.kit.json to bob\n" in done.output
    assert "mallory gets no kit; its certificate is still valid until 20" in done.output
    assert "shut it out now with `pfed pki revoke mallory --authority ca`" in done.output
    assert sorted(path.name for path in Path("kits").iterdir()) == ["alice.kit.json", "bob.kit.json"]
    installed = requested("install", "kits/alice.kit.json", "a")
    assert "a is now client alice of federation hospitals, epoch 2, until" in installed.output
    assert [shown(requested, folder)["epoch"] for folder in ("a", "b", "m", "ca")] == [2, 1, 1, 2]
    assert shown(requested, "ca")["removed"] == ["mallory"]
    assert "removed: mallory" in requested("show", "ca").output
    assert "this kit is for another client's key" in refused(requested("install", "kits/alice.kit.json", "m"))
    assert "already has epoch 2" in refused(requested("install", "alice.kit.json", "a", "--yes"))
    admit(requested, "m", "mallory")
    assert shown(requested, "m")["epoch"] == 2
    assert shown(requested, "ca")["removed"] == []


def test_a_renewal(requested: Run) -> None:
    admit(requested, "a", "alice")
    before = shown(requested, "a")
    asked = requested("renew", "a")
    assert "renewal of client alice: send a/renewal.csr to the authority" in asked.output
    approved = requested("approve", "a/renewal.csr", "--authority", "ca", answer="y\n")
    assert f"renews: {spaced(str(before['fingerprint']))}" in approved.output
    assert "a is now client alice of federation" in requested("install", "alice.kit.json", "a", "--yes").output
    after = shown(requested, "a")
    assert after["pseudonym"] == before["pseudonym"]
    assert spaced(str(after["fingerprint"])) in asked.output


def test_a_stolen_key(requested: Run) -> None:
    for folder, name in (("a", "alice"), ("b", "bob"), ("m", "mallory")):
        admit(requested, folder, name)
    done = requested("revoke", "mallory", "--authority", "ca", "--kits", "kits")
    serial = shown(requested, "m")["serial"]
    assert f"revoked: client mallory, certificate {serial}\n" in done.output
    assert "with 1 certificates: give revoked.crl to the server's operator now" in done.output
    assert "epoch 2 begins" in done.output
    assert sorted(path.name for path in Path("kits").iterdir()) == ["alice.kit.json", "bob.kit.json"]
    assert shown(requested, "ca")["revoked"] == [serial]
    assert requested("show", "ca").output.count("REVOKED, was live until 20") == 1
    assert "its certificate is revoked" in requested("rotate", "ca", "--kits", "more").output
    first = Path("revoked.crl").read_bytes()
    again = requested("revoke", "mallory", "--authority", "ca", "--crl", "again.crl")
    assert "nothing new to revoke of mallory" in again.output
    assert Path("again.crl").read_bytes() != first == Path("revoked.crl").read_bytes()
    advised = requested("revoke", "bob", "--authority", "ca")
    assert "make a new one with `pfed pki rotate ca --kits kits`" in advised.output
    assert "eve has no certificate that is still valid" in refused(requested("revoke", "eve", "--authority", "ca"))


def test_an_unknown_leaver(requested: Run) -> None:
    admit(requested, "a", "alice")
    unknown = requested("rotate", "ca", "--kits", "kits", "--without", "alice", "--without", "malory")
    assert "malory is no client with a live certificate: `pfed pki show ca` lists them" in refused(unknown)
    assert shown(requested, "ca")["epoch"] == 1
    assert not Path("kits").exists()


def test_the_kit_of_a_rotation_from_a_strange_authority(requested: Run) -> None:
    """It is not asked about, so it must be of the authority that is installed."""
    admit(requested, "a", "alice")
    requested("init", "other", "--federation", "hospitals")
    requested("approve", "a/identity.csr", "--authority", "other", "--yes", "--kit", "x.json")
    requested("rotate", "other", "--kits", "kits")
    strange = ("install", "kits/alice.kit.json", "a")
    assert "this kit is of another authority than the one of a: nothing was done" in refused(
        requested(*strange, "--yes")
    )
    assert "not the one that you gave" in refused(requested(*strange, "--fingerprint", "00"))


def test_a_request_of_an_older_version(requested: Run) -> None:
    old = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "alice")])
    )
    role = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pfedsecure:role:client")])
    csr = old.add_extension(role, critical=False).sign(new_private_key(), hashes.SHA256())
    Path("old.csr").write_bytes(csr.public_bytes(Encoding.PEM))
    lacking = refused(requested("approve", "old.csr", "--authority", "ca", "--yes"))
    assert "the request lacks the keys that a client needs, an older version made it: delete that file" in lacking
    assert not Path("alice.kit.json").exists()


def test_a_closed_input_is_no_confirmation(requested: Run) -> None:
    assert requested("approve", "a/identity.csr", "--authority", "ca").exit_code != 0
    assert Authority.load(Path("ca")).issued() == []


def test_a_privileged_role_must_be_granted_by_name(requested: Run) -> None:
    requested("request", "o", "--name", "olga", "--role", "operator")
    result = requested("approve", "o/identity.csr", "--authority", "ca", "--yes")
    assert "asks for role operator: if that is right, approve it with --role operator" in refused(result)


def test_a_taken_name(requested: Run) -> None:
    requested("approve", "a/identity.csr", "--authority", "ca", "--yes")
    requested("request", "b", "--name", "alice")
    again = ("approve", "b/identity.csr", "--authority", "ca", "--yes")
    assert "name alice belongs to another key until" in refused(requested(*again))
    assert requested(*again, "--replace", "--kit", "second.json").exit_code == 0
    assert Path("second.json").exists()


def test_install_refuses_what_is_not_vouched_for_or_not_for_this_key(requested: Run) -> None:
    requested("approve", "a/identity.csr", "--authority", "ca", "--yes")
    assert "not the one that you gave" in refused(requested("install", "alice.kit.json", "a", "--fingerprint", "ab"))
    assert "not confirmed" in refused(requested("install", "alice.kit.json", "a", answer="n\n"))
    requested("request", "b", "--name", "bob")
    wrong = requested("install", "alice.kit.json", "b", "--yes")
    assert "this certificate is for alice with another key than b/identity.key" in refused(wrong)
    assert "a/identity.csr is not a kit" in refused(requested("install", "a/identity.csr", "a", "--yes"))
    assert not list(Path().glob("[ab]/*.crt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init", "ca", "--federation", "other"], "ca is not empty: choose another folder"),
        (["init", "new", "--federation", "two words"], "name 'two words' is not allowed"),
        (["request", "a", "--name", "alice"], "a/identity.csr exists: have it approved"),
        (["request", "s", "--name", "fl", "--role", "server"], "a server needs a host"),
        (["approve", "none.csr", "--authority", "ca"], "cannot read none.csr: No such file or directory"),
        (["approve", "a/identity.key", "--authority", "ca"], "a/identity.key is not a request"),
        (["approve", "a/identity.csr", "--authority", "a"], "a holds no authority: make one with"),
        (["install", "none.json", "a"], "cannot read none.json"),
        (["rotate", "a", "--kits", "kits"], "a holds no authority: make one with"),
        (["rotate", "ca", "--kits", "kits"], "ca has no cohort secret yet"),
    ],
)
def test_mistakes_take_one_line(requested: Run, words: list[str], message: str) -> None:
    assert message in refused(requested(*words))


@pytest.mark.parametrize(
    "words",
    [
        ["init", "ca"],
        ["request", "b"],
        ["request", "b", "--name", "bob", "--role", "root"],
        ["request", "b", "--name", "bob", "--role", "author"],
        ["rotate", "ca"],
        ["rotate", "--kits", "kits"],
        ["approve", "a/identity.csr"],
        ["approve", "a/identity.csr", "--authority", "ca", "--days", "0"],
    ],
)
def test_wrong_usage(requested: Run, words: list[str]) -> None:
    assert requested(*words).exit_code == 2
