"""The command `pfed demo`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
from rich.console import Console

from pfed_cli.demo.federation import run_federation
from pfed_cli.demo.layout import Layout, demo_clients, demo_plan


@click.command()
@click.option("--clients", "n_clients", type=click.IntRange(3, 20), default=5, show_default=True, help="How many.")
@click.option("--rounds", type=click.IntRange(1), help="How many.  [default: the demo plan's]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for states, logs, summary and report.",
)
@click.option("--seed", type=click.IntRange(0), help="Of everything that is random.  [default: the demo plan's]")
@click.option(
    "--fresh/--keep", default=True, show_default=True, help="Start anew, or go on with a demo that was interrupted."
)
def demo(n_clients: int, rounds: int | None, out: Path, seed: int | None, fresh: bool) -> None:
    """A real federation on this machine: one server and some clients as processes of their own, over mutual TLS.

    Each client has its own share of scikit-learn's handwritten digits, in a writing condition of its own, and trains a
    personal classifier on the embedded tiny CLIP. At the end the others of a table are computed in this process: the
    model without training, prompts trained alone, one shared prompt, and the gate without borrowed prompts.
    """
    console = Console()
    started = time.monotonic()
    plan = demo_plan(rounds=rounds, n_clients=n_clients, seed=seed)
    clients = demo_clients(n_clients, plan.seed)
    layout = Layout.prepare(out, plan, keep=not fresh)
    console.print(
        f"{n_clients} clients and a server, {plan.rounds.count} rounds; logs in {layout.logs}", soft_wrap=True
    )

    federation = run_federation(layout, plan, clients, console)
    with console.status("computing what it is compared with"):
        import torch  # takes seconds

        from pfed_cli.demo.baselines import compare
        from pfed_cli.demo.report import render
        from pfed_cli.demo.summary import summarise, summary_table

        torch.set_num_threads(1)  # as the clients: sums depend on how they are split
        comparison = compare(layout, plan, clients)
    summary = summarise(plan, clients, federation, comparison, time.monotonic() - started)
    layout.summary_file.write_text(json.dumps(summary, indent=1) + "\n")
    layout.report_file.write_text(render(plan, summary, federation, comparison))
    console.print(summary_table(summary))
    for sentence in plan.unprotected():
        console.print(f"NOT PROTECTED: {sentence}", soft_wrap=True, highlight=False)
    console.print(f"{summary['seconds']:.0f} s; report: {layout.report_file}", soft_wrap=True, highlight=False)
