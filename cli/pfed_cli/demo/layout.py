"""Where a demo keeps what, and the plan that its parties agree on.

plan.toml  certs/  server/  clients/NAME/  logs/NAME.log  summary.json  report.html
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click

from pfed_cli.plan_file import to_toml
from pfed_server.cli import DEMO_PLAN
from pfedsecure.data.digits import CONDITIONS
from pfedsecure.plan import Plan

_OWN = ("plan.toml", "certs", "server", "clients", "logs", "summary.json", "report.html")
_PATIENCE_SECONDS = 600.0
"""Deadline of a round: on a slow machine a late client is waited for, so that the outcome depends on the seed alone."""


@dataclass(frozen=True)
class DemoClient:
    """One client process: its name, its images as `--data` has them, and how these are written."""

    name: str
    data: str
    condition: str


@dataclass(frozen=True)
class Layout:
    """The folder of one demo."""

    folder: Path

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.toml"

    @property
    def development_pki(self) -> Path:
        """Made by the server, which runs in `folder`."""
        return self.folder / "certs" / "dev"

    @property
    def summary_file(self) -> Path:
        return self.folder / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.html"

    def client_state(self, name: str) -> Path:
        return self.folder / "clients" / name

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    @classmethod
    def prepare(cls, folder: Path, plan: Plan, *, keep: bool) -> Self:
        """The folder, made ready. Unless `keep`, what an earlier demo left in it goes.

        Raises click.UsageError for a folder with anything else in it, of which nothing is touched then.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(path.name for path in folder.iterdir() if path.name not in _OWN)
        except OSError as error:
            raise click.UsageError(f"--out {folder}: cannot be used ({error.strerror})") from None
        if foreign:
            raise click.UsageError(f"--out {folder}: holds {foreign[0]}, which is no demo's; give a folder of its own")
        if not keep:
            for name in _OWN:
                _remove(folder / name)
        layout = cls(folder.absolute())
        layout.logs.mkdir(exist_ok=True)
        layout.plan_file.write_text(to_toml(plan))
        return layout


def demo_plan(*, rounds: int | None, n_clients: int, seed: int | None) -> Plan:
    """The embedded demo's plan, for just these clients: no round goes on without all of them."""
    plan = Plan.from_toml(DEMO_PLAN)
    rounds_plan = plan.rounds.model_copy(
        update={
            "count": plan.rounds.count if rounds is None else rounds,
            "start_clients": n_clients,
            "minimum_cohort": n_clients,
            "deadline_seconds": _PATIENCE_SECONDS,
        }
    )
    return plan.model_copy(update={"rounds": rounds_plan, "seed": plan.seed if seed is None else seed})


def demo_clients(n_clients: int, seed: int) -> list[DemoClient]:
    """The clients: a share of the embedded digits each, dealt by `seed`, in a writing condition of its own."""
    return [
        DemoClient(f"client-{number + 1}", f"demo:{number}/{n_clients}:{seed}", CONDITIONS[number % len(CONDITIONS)])
        for number in range(n_clients)
    ]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
