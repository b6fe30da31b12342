"""Every shell command in README.md, docs/ and certs/README.md is run, or it is said why not.

A code block without a language, or with the language `sh`, is shell commands; all else names its language. A new
command is run like the others, in the folder and with the files that the docs tell of (conftest.py).
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from markdown_it import MarkdownIt

import pfed_cli.main
import pfed_client.cli
import pfed_server.cli
from pfed_server.audit_chain import verify
from pfedsecure.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "certs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, click.Command] = {
    "pfed": pfed_cli.main.main,
    "pfed-server": pfed_server.cli.main,
    "pfed-client": pfed_client.cli.main,
}
OURS = tuple(PROGRAMS)

# --- the table -------------------------------------------------------------------------------------------------------

PLACES = {
    r"(?<=\s)/(etc|var)/": "{machine}/\\1/",
    r"/opt/pfed\b": "{machine}/opt/pfed",
    r"/data/images\b": "{images}",
    r"(?<=--pretrained )/models/ViT-B-16\.pt": "embedded",  # what the plan for trying things out has
    r"\bpfed\.example\.org:8470": "{server}",
    r"\b0\.0\.0\.0:8470": "{free}",
    r"\bPYTHON\b": "{python}",
    r"\bFILE\b": "file.json",
    r"IMAGE\.\.\.": "{images}/star/0.png {images}/star/1.png",
    r"3f9a\.\.\.": "{head}",
    r"^(\.venv/bin/python|python3\.11)(?= )": "{python}",
    r"^pytest\b": "{python} -m pytest",
}
"""What stands for something else, in all commands: paths, hosts, names in capitals."""

SHORTER = {
    r"^make": "make --dry-run",  # what it would do; the programs are run by other tests
    r"^pfed bench [\w-]+": "\\g<0> --quick",
    r"(?<=^pfed simulate --clients )\d+": "3 --rounds 1",
    r" --flower-python \S+": "",  # Flower is not among the packages of constraints.txt
    r"(?<=pytest tests/chaos) -m slow": "\\g<0> --collect-only",  # minutes; `make test-slow` runs them
}
"""What is changed in commands that are run, so that all together take less than three minutes."""

NOT_RUN = {
    "useradd --system --home-dir /var/lib/pfed --shell /usr/sbin/nologin pfed": "changes this machine",
    "/opt/pfed/bin/pip install --constraint constraints.txt --requirement deploy/server-requirements.txt": "downloads",
    "/opt/pfed/bin/pip install --no-deps .": "tests/test_wheel.py builds and installs the package",
    "/opt/pfed/bin/pip install --constraint constraints.txt 'psycopg[binary]'": "downloads",
    "install -m 0600 -o root pgpass /etc/pfed/pgpass": "is for root, and for a file with a password",
    "systemctl daemon-reload": "changes this machine",
    "systemctl enable --now pfed-server": "changes this machine; tests/test_deploy.py checks the unit",
    "pfed bench operations --long --json FILE": "takes hours",
    "pip install 'pfedsecure[ray]'": "downloads",
    "pfed simulate --clients 200 --ray": "takes Ray; tests/cli/test_simulation_on_ray.py runs it where that is",
    "pfed simulate --clients 1000 --ray ray://head:10001 --workers 64 --plan plan.toml --data /data/images": "cluster",
}
"""Commands that nothing here runs, with the reason."""

PRIVATE = "pfed-client --dp-epsilon 8"
"""The member whose state `state/clients/client-1` is where a command speaks of it."""

CHEAP = ("make", "install")
"""Blocks of nothing but these, and of what is not run, are in the fast suite."""

AT_THE_ROOT = ("make", sys.executable)
"""Programs that are run in this checkout itself, not in a copy of what is in it."""

# --- what the docs say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A code block of a page: its place as an editor shows it, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> tuple[str, ...]:
        """One line each, as `shlex.join` writes it. Raises ValueError for what is more than words and `&&`."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
            reader.whitespace_split = True
            command: list[str] = []
            for word in [*reader, "&&"]:
                if word == "&&":
                    found += [shlex.join(command)] if command else []
                    command = []
                elif set(word) <= set("&|;<>()"):
                    raise ValueError(f"{self}: {word!r} in {line!r} is more than a test can do: write simpler commands")
                else:
                    command.append(word)
        return tuple(found)


def blocks_of(page: str, text: str) -> list[Block]:
    tokens = [token for token in MarkdownIt("commonmark").parse(text) if token.type in ("fence", "code_block")]
    return [Block(page, token.map[0] + 1, token.info.strip() or "sh", token.content) for token in tokens if token.map]


BLOCKS = [block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text())]
SHELL = [block for block in BLOCKS if block.language == "sh"]
COMMANDS = list(dict.fromkeys(command for block in SHELL for command in block.commands))
INLINE = sorted(
    {
        code
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
        if code.split()[0] in OURS and code not in COMMANDS
    }
)


def changed(command: str, changes: Mapping[str, str], values: Mapping[str, object]) -> str:
    for pattern, new in changes.items():
        command = re.sub(pattern, lambda match, new=new: match.expand(new).format(**values), command)
    return command


def is_member(command: str) -> bool:
    """Whether it is a client that takes part until the federation is finished."""
    return re.match(r"pfed-client( --|$)", command) is not None


MEMBERS = [PRIVATE]
for _block in SHELL:
    MEMBERS += [command for command in _block.commands if is_member(command) and command != PRIVATE]
SERVERS = [command for command in COMMANDS if command.startswith("pfed-server")]
"""All that the docs have take part in one federation, the private one as client-1."""


def is_cheap(block: Block) -> bool:
    return all(command in NOT_RUN or command.split()[0] in CHEAP for command in block.commands)


# --- tests -----------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {"machine": "", "images": "/data/images", "server": "127.0.0.1:1", "free": "127.0.0.1:2"}
VALUES |= {"python": sys.executable, "head": "0" * 64}


def test_there_are_commands_and_every_other_block_names_its_language() -> None:
    assert len(COMMANDS) > 25
    known = {"sh", "sql", "toml", "text", "ini", "python", "json", "yaml"}
    assert {block.language for block in BLOCKS} <= known
    hidden = [f"{b}: {line}" for b in BLOCKS if b.language != "sh" for line in b.text.splitlines() if shell_line(line)]
    assert hidden == [], "commands in a block that says it is something else"


def shell_line(line: str) -> bool:
    return (
        re.match(r"\s*(\$ )?(pfed(-server|-client)?|make|pip|python3?|pytest|podman|docker|systemctl) \S", line)
        is not None
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_or_listed(command: str) -> None:
    run = (*OURS, "make", "install", "pytest", "python3.11", ".venv/bin/python")
    assert command in NOT_RUN or command.split()[0] in run, "neither run nor listed: see the table of this test"


def test_one_server_will_do() -> None:
    assert len(SERVERS) == 1
    assert len(MEMBERS) >= 3


def test_the_table_knows_nothing_that_the_docs_do_not_say() -> None:
    assert set(NOT_RUN) <= set(COMMANDS)
    assert PRIVATE in COMMANDS
    run = [command for command in COMMANDS if command not in NOT_RUN]
    assert [pattern for pattern in PLACES if not any(re.search(pattern, command) for command in COMMANDS)] == []
    placed = [changed(command, PLACES, VALUES) for command in run]
    assert [pattern for pattern in SHORTER if not any(re.search(pattern, command) for command in placed)] == []
    assert [program for program in CHEAP if not any(command.startswith(program) for command in run)] == []


def resolved(words: list[str]) -> tuple[click.Context, list[str]]:
    """The innermost command of ours that `words` name, with all parents, and the words behind its name.

    Options may stand between names only where click takes them, so a command is asked for them when it is parsed.
    """
    name, *rest = words
    found: click.Command = PROGRAMS[name]
    context = click.Context(found, info_name=name)
    while rest and isinstance(found, click.Group) and (inner := found.get_command(context, rest[0])) is not None:
        name, *rest = rest
        found = inner
        context = click.Context(found, parent=context, info_name=name)
    return context, rest


def parsed(command: str) -> None:
    """Let click read a command of ours, without running it. Raises click.UsageError."""
    context, rest = resolved(shlex.split(command))
    made = context.command.make_context(context.info_name, rest, parent=context.parent)
    if isinstance(made.command, click.Group) and (left := [*made._protected_args, *made.args]):
        made.command.resolve_command(made, left)  # which is none that there is


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[0] in OURS])
def test_options_exist_and_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed(changed(command, PLACES, VALUES))


@pytest.mark.parametrize("code", INLINE)
def test_options_in_running_text_exist(code: str) -> None:
    """These have gaps, so that they cannot be parsed as they are."""
    context, rest = resolved(re.sub(r"[\[\]]", " ", code).split())
    assert not (rest and isinstance(context.command, click.Group) and re.fullmatch("[a-z][a-z-]*", rest[0]))
    there = {
        option
        for parameter in context.command.get_params(context)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= there


@pytest.mark.parametrize("command", [command for command in COMMANDS if " install " in command])
def test_what_is_installed_exists(command: str) -> None:
    """Files, and extras of this package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in shlex.split(command):
        if word.endswith(".txt") or word.startswith("deploy/"):
            assert (ROOT / word).is_file()
        elif (asked := re.fullmatch(r"pfedsecure\[(\w+)\]", word)) is not None:
            assert asked[1] in extras


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=str)
def test_plans_are_plans(block: Block, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(block.text)
    Plan.from_toml(tmp_path / "plan.toml")


def run_block(block: Block, world: Any) -> None:
    """Run a block's commands one after the other; those that take part in a federation together."""
    together = [command for command in block.commands if command in (*MEMBERS, *SERVERS)]
    if together:
        assert together == list(block.commands), "who takes part in a federation stands in a block of its own"
        world.federation(MEMBERS, *SERVERS)
        return
    for command in block.commands:
        if command not in NOT_RUN:
            run_command(command, world)


def run_command(command: str, world: Any) -> None:
    where = world.home
    if "state/clients/client-1" in command:
        where = world.federation(MEMBERS, *SERVERS)
    values = VALUES | {"images": world.images, "free": world.free_address()}
    if re.search(r"/(etc|var)/|pfed\.example", command):
        values["machine"] = world.machine("client" if "doctor client" in command else "server")
    elif "/opt/pfed" in command:
        values["machine"] = world.home
    if "pfed.example.org" in command:
        values["server"] = world.server()
    if "audit" in command:
        world.server()  # its log
        values["head"] = verify(values["machine"] / "var/lib/pfed/server/audit.jsonl").head
    short = changed(changed(command, PLACES, values), SHORTER, values)
    if short.startswith(AT_THE_ROOT):
        where = ROOT
    done = world.run(short, where)
    assert done.returncode == 0, f"{command}\nran as: {short}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("block", [block for block in SHELL if is_cheap(block)], ids=str)
def test_cheap_commands_run(block: Block, world: Any) -> None:
    run_block(block, world)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", [block for block in SHELL if not is_cheap(block)], ids=str)
def test_commands_run(block: Block, world: Any) -> None:
    run_block(block, world)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_reads_what_was_exported(world: Any) -> None:
    """README.md says so beside `pfed-client export`, which may have run in another process of these tests."""
    where = world.federation(MEMBERS, *SERVERS)
    for command in (
        "pfed-client export --state state/clients/client-1 again.safetensors",
        f"{sys.executable} {ROOT}/docs/examples/load_export.py again.safetensors {world.images}/star/0.png",
    ):
        done = world.run(command, where)
        assert done.returncode == 0, done.stderr


PLANTED = {
    "a wrong option": "pfed audit verify --heads 1 /var/lib/pfed/server/audit.jsonl",
    "a wrong command": "pfed audits verify FILE",
    "a program that nobody knows": "pfedd audit",
}


@pytest.mark.parametrize("command", PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found(command: str) -> None:
    """A page with it fails these tests."""
    (block,) = blocks_of("page.md", f"Text.\n\n    {command}    # said of it\n")
    assert block.commands == (command,)
    with pytest.raises((AssertionError, click.UsageError)):
        checked(command)


def checked(command: str) -> None:
    test_every_command_is_run_or_listed(command)
    parsed(changed(command, PLACES, VALUES))
