"""`pfed-server` as a user meets it: options that do not go together, and one line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pfed_server.cli import DEMO_PLAN, main
from pfedsecure.clip.config import context_shape
from pfedsecure.errors import IdentityError, InsecureTransport, PlanError, ProtectionUnavailable, StateError
from pfedsecure.plan import Plan

CLEAR = """
class_names = ["a", "b"]
backbone.text_width = 64
mixture.gate_width = 64
protection = {aggregation = "plain", experts = "plain", matching = "plain"}
"""


def invoke(arguments: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --tls and --insecure"),
        (["--tls", "--insecure"], "give one of --tls and --insecure"),
        (["--insecure", "--identity", "x"], "--identity goes with --tls"),
        (["--insecure", "--crl", "x"], "--crl goes with --tls"),
        (["--tls", "--listen", "8470"], "'8470' is not HOST:PORT, such as 127.0.0.1:8470"),
        (["--tls", "--listen", "::1:8470"], "write an IPv6 address in brackets"),
        (["--tls", "--backbone-dir", "nowhere"], "Directory 'nowhere' does not exist"),
    ],
)
def test_usage_errors_end_with_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(arguments, tmp_path, monkeypatch)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tls", "--plan", "nowhere.toml"], PlanError.exit_code, "nowhere.toml: cannot read the plan"),
        (["--tls", "--plan", "bad.toml"], PlanError.exit_code, "bad.toml: class_names is missing; add it"),
        (["--tls", "--plan", "long.toml"], PlanError.exit_code, "prompt.context_length 31 does not fit tiny-clip"),
        (["--tls", "--plan", "odd.toml"], PlanError.exit_code, "backbone.text_width is not given and cannot be looked"),
        (["--tls", "--identity", "nowhere"], IdentityError.exit_code, "nowhere holds no identity"),
        (["--insecure", "--listen", "0.0.0.0:0"], InsecureTransport.exit_code, "--insecure would send plain text"),
        (["--insecure"], ProtectionUnavailable.exit_code, 'the plan asks for protection.aggregation = "secure", which'),
        (
            ["--insecure", "--plan", "clear.toml", "--state", "bad.toml"],
            StateError.exit_code,
            "bad.toml: cannot be used as state directory",
        ),
    ],
)
def test_mistakes_end_with_one_line_and_their_own_status(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.toml").write_text('name = "x"\n')
    (tmp_path / "odd.toml").write_text('class_names = ["a", "b"]\n[backbone]\nmodel = "no-such-model"\n')
    (tmp_path / "clear.toml").write_text(CLEAR)
    (tmp_path / "long.toml").write_text(f'{CLEAR}prompt.context_length = 31\nbackbone.model = "tiny-clip"\n')
    result = invoke(arguments, tmp_path, monkeypatch)
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"pfed-server: error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "clear.toml", "long.toml", "odd.toml"]


def test_the_embedded_plan_is_valid_and_its_words_fill_its_context() -> None:
    plan = Plan.from_toml(DEMO_PLAN)
    assert len(plan.class_names) == 10
    assert len(plan.prompt.context_init.split()) == plan.prompt.context_length
    assert context_shape(plan)[0] == plan.prompt.context_length


def test_the_server_needs_no_torch() -> None:
    code = "import sys, pfed_server.cli; print({'torch', 'open_clip', 'pfed_client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(("file", "message"), [("nowhere.crl", "cannot read"), ("bad.crl", "is no revocation list")])
def test_without_a_good_revocation_list_no_state_is_made(
    file: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.crl").write_text("junk")
    result = invoke(["--tls", "--crl", file], tmp_path, monkeypatch)
    assert result.exit_code == IdentityError.exit_code
    assert result.stderr.splitlines()[-1].startswith("pfed-server: error: ")
    assert message in result.stderr
    assert file in result.stderr
    assert not (tmp_path / "state").exists()


def test_pages_are_on_loopback_unless_somebody_says_where() -> None:
    assert main.make_context("pfed-server", ["--tls"]).params["metrics_at"] is None
    given = main.make_context("pfed-server", ["--tls", "--metrics", "--dashboard", "--listen", "0.0.0.0:1"]).params
    assert (str(given["metrics_at"]), str(given["dashboard"])) == ("127.0.0.1:9470", "127.0.0.1:8471")
    given = main.make_context("pfed-server", ["--tls", "--metrics", "192.0.2.1:9"]).params
    assert str(given["metrics_at"]) == "192.0.2.1:9"
