"""The whole ceremony of a deployment through `pfed pki`, and each way in which a step refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pfed_cli.pki import pki
from pfedsecure.errors import IdentityError
from pfedsecure.pki.authority import Authority
from pfedsecure.pki.certificates import spaced
from pfedsecure.pki.identity import Identity

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
    text = pfed_pki("show", "a").output
    assert f"fingerprint: {spaced(str(identity['fingerprint']))}" in text
    assert "problem: -" in text
    assert "  client alice, live until" in pfed_pki("show", "ca").output


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
    assert "a/identity.csr is not an approval kit" in refused(requested("install", "a/identity.csr", "a", "--yes"))
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
        ["approve", "a/identity.csr"],
        ["approve", "a/identity.csr", "--authority", "ca", "--days", "0"],
    ],
)
def test_wrong_usage(requested: Run, words: list[str]) -> None:
    assert requested(*words).exit_code == 2
