"""The `pfed` command."""

from __future__ import annotations

import click

import pfedsecure
from pfed_cli.lazy import LazyCommand, LazyGroup

COMMANDS = {
    "demo": LazyCommand("pfed_cli.demo.command", "demo", "A federation of five clients on this machine, and a report."),
    "simulate": LazyCommand("pfed_cli.simulate.command", "simulate", "Many clients in one process, to try a plan out."),
    "pki": LazyCommand("pfed_cli.pki", "pki", "Certificates: who takes part in a federation."),
    "status": LazyCommand("pfed_cli.status", "status", "Where a federation stands."),
    "audit": LazyCommand("pfed_cli.audit", "audit", "A server's audit log: whether it holds, and what is in it."),
    "doctor": LazyCommand("pfed_cli.doctor.command", "doctor", "What is wrong with a deployment, and what to do."),
    "move": LazyCommand("pfed_cli.move", "move", "A federation from its file into PostgreSQL."),
    "bench": LazyCommand("pfed_benchmarks.cli", "bench", "Measurements, each into one JSON file."),
    "bench-table": LazyCommand("pfed_benchmarks.cli", "bench_table", "The tables of docs/ from those files."),
    "bench-plot": LazyCommand("pfed_benchmarks.cli", "bench_plot", "The pictures of docs/ from those files."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
@click.version_option(pfedsecure.__version__, prog_name="pfed")
def main() -> None:
    """Federated prompt learning for CLIP: everything around `pfed-server` and `pfed-client`."""


if __name__ == "__main__":
    main()
