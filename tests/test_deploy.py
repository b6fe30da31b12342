"""deploy/: what a server takes, the container file and the systemd units are those of the program as it is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pfed_cli.doctor.machine import SERVER_PACKAGES
from pfed_client.cli import main as client
from pfed_server.cli import main as server
from pfedsecure import errors

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UNITS = {"pfed-server": server, "pfed-client": client}
MENDS_BY_ITSELF = {
    errors.ServerUnreachable,
    errors.AddressInUse,
    errors.MessageRejected,
    errors.NotAMember,
    errors.StateLocked,
    errors.TooManyCalls,
}


def server_requirements() -> set[str]:
    lines = (DEPLOY / "server-requirements.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines if "==" in line}


def test_what_a_server_takes_is_of_the_project_and_pinned() -> None:
    project = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    assert server_requirements() == SERVER_PACKAGES <= project
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in project} <= pinned()


WITHOUT_THE_REST = """
import importlib, importlib.abc, pkgutil, sys, json
allowed = set(json.loads(sys.argv[1]))

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
import pfed_server, pfed_cli.doctor
for package in (pfed_server, pfed_cli.doctor):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "versions" not in module.name and not module.name.endswith((".env", "__main__", "doctor.client")):
            importlib.import_module(module.name)
for name in ("audit", "pki", "status", "main"):
    importlib.import_module("pfed_cli." + name)
import pfedsecure.matching.he.evaluation
print("all there")
"""


def closure(names: set[str]) -> set[str]:
    """The distributions that these bring along, normalised."""
    found: set[str] = set()
    waiting = [re.sub(r"[-_.]+", "-", name).lower() for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return found


def test_a_server_runs_with_nothing_else() -> None:
    distributions = closure(server_requirements())
    modules = {
        module
        for module, names in metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in distributions for name in names)
    }
    assert not modules & {"torch", "open_clip", "opacus", "matplotlib"}
    ours = {"pfedsecure", "pfed_server", "pfed_cli", "pfed_client"}
    command = [sys.executable, "-c", WITHOUT_THE_REST, json.dumps(sorted(modules | ours))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "all there\n", done.stderr


def test_the_container_file_copies_what_there_is_and_starts_what_there_is() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ") and "--from" not in line]
    sources = {source for line in copied for source in line}
    assert all((ROOT / source).exists() for source in sources)
    folders = {path.split("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]} <= sources
    command = json.loads(re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)[0])
    assert re.search(r'^ENTRYPOINT \["pfed-server"\]$', text, re.MULTILINE)
    given = server.make_context("pfed-server", command).params
    assert given["tls"]
    assert str(given["listen"]) == "0.0.0.0:8470"
    assert re.search(r"^USER 10001$", text, re.MULTILINE)


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_gives_options_that_there_are_and_restarts_what_may_mend(name: str) -> None:
    text = (DEPLOY / f"{name}.service").read_text()
    words = re.findall(rf"^ExecStart=/opt/pfed/bin/{name} (.*)$", text, re.MULTILINE)[0].split()
    words = [word.replace("${PFED_SERVER}", "host:1").replace("${PFED_DATA}", "data") for word in words]
    context = UNITS[name].make_context(name, [word for word in words if word != "$PFED_OPTIONS"])
    assert context.params["log_format"] == "json"
    final = set(map(int, re.findall(r"^RestartPreventExitStatus=(.*)$", text, re.MULTILINE)[0].split()))
    mends = {cls.exit_code for cls in MENDS_BY_ITSELF}
    assert final == {2} | {cls.exit_code for cls in errors.PfedError.__subclasses__()} - mends


def test_the_drop_in_for_postgresql_changes_where_the_federation_is_and_nothing_else() -> None:
    pytest.importorskip("psycopg")
    command = {}
    for file in ("pfed-server.service", "pfed-server-postgresql.conf"):
        text = (DEPLOY / file).read_text()
        words = shlex.split(re.findall(r"^ExecStart=/opt/pfed/bin/pfed-server (.*)$", text, re.MULTILINE)[0])
        command[file] = server.make_context("pfed-server", words).params
    database = command["pfed-server-postgresql.conf"].pop("database")
    assert command["pfed-server.service"].pop("database") is None
    assert command["pfed-server.service"] == command["pfed-server-postgresql.conf"]
    assert database.parameters["sslmode"] == "verify-full"
    assert database.parameters["sslrootcert"].startswith("/etc/pfed/")


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze on this machine")
def test_systemd_understands_a_unit_and_finds_it_hardened(name: str) -> None:
    unit = str(DEPLOY / f"{name}.service")
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    complaints = [line for line in checked.stderr.splitlines() if f"{name}.service" in line]
    assert all("is not executable" in line for line in complaints), complaints
    command = ["systemd-analyze", "security", "--offline=true", unit]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    if (level := re.search(r"exposure level for .+: ([\d.]+)", judged.stdout)) is None:
        pytest.skip("this systemd-analyze is too old to judge a unit offline")
    assert float(level[1]) < 3
