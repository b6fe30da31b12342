"""Click groups that import a command only when it runs, so that `--help` is instant and pki needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import click

from pfedsecure.console import exit_cleanly


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is (`module`, `attribute`), and its line in the list of commands."""

    module: str
    attribute: str
    summary: str


class LazyGroup(click.Group):
    """A group of lazy commands; a PfedError of any of them ends the process as `exit_cleanly` says."""

    def __init__(self, lazy: Mapping[str, LazyCommand], **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]  # click's own settings, passed on
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        target = self._lazy[cmd_name]
        command = getattr(import_module(target.module), target.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, target.summary) for name, target in self._lazy.items()])

    def invoke(self, ctx: click.Context) -> object:
        with exit_cleanly("pfed"):
            return super().invoke(ctx)
