"""`pfed bench`, `bench-table` and `bench-plot`: the benchmarks, and tables and pictures of what they measured."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from pfed_cli.lazy import LazyCommand, LazyGroup
from pfedsecure.errors import BenchError

from . import BENCHMARKS, module_of
from .contract import Report
from .tables import replace_table, table_of

_COMMANDS = {name: LazyCommand(module_of(name), "command", summary) for name, summary in BENCHMARKS.items()}

_PICTURES = {
    "experts": (".experts_plot", "plot_experts"),
    "privacy-utility": (".privacy_report", "write_plot"),
}
"""Module and function of each; matplotlib takes a while to import."""


@click.group(cls=LazyGroup, lazy=_COMMANDS, invoke_without_command=True)
@click.option("--list", "list_names", is_flag=True, help="Print the names of the benchmarks.")
@click.pass_context
def bench(ctx: click.Context, list_names: bool) -> None:
    """Measure: `pfed bench NAME --json FILE` writes one object with machine, parameters, rows and bars."""
    if list_names:
        click.echo("\n".join(BENCHMARKS))
        ctx.exit()
    if ctx.invoked_subcommand is None:
        raise click.UsageError("give a benchmark's name; --list prints them", ctx)


@click.command("bench-table")
@click.argument("files", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--into",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    metavar="FILE.md",
    help="Replace the table there, between its two marks, instead of printing it.",
)
def bench_table(files: tuple[Path, ...], into: Path | None) -> None:
    """The Markdown table of each of FILES, which `pfed bench` wrote."""
    for report in [Report.read(file) for file in files]:
        table = table_of(report)
        if into is None:
            click.echo(table)
        else:
            into.write_text(replace_table(into.read_text(), report.bench, table))
            click.echo(f"table of {report.bench} in {into}")


@click.command("bench-plot")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--into",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    required=True,
    help="Where the picture goes.",
)
def bench_plot(file: Path, into: Path) -> None:
    """The picture of FILE, which `pfed bench experts` or `pfed bench privacy-utility` wrote."""
    report = Report.read(file)
    if report.bench not in _PICTURES:
        raise BenchError(f"benchmark {report.bench} has no picture; {' and '.join(_PICTURES)} have")
    module, function = _PICTURES[report.bench]
    getattr(import_module(module, __package__), function)(report, into)
    click.echo(f"picture of {report.bench} in {into}")
