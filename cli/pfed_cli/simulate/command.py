"""The command `pfed simulate`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from pfed_cli.simulate.plans import demo_plan, fitted
from pfed_cli.simulate.shares import Indices, Partition, all_digits, digits_of, joined, partition
from pfedsecure.data import ImageSet, open_images
from pfedsecure.plan import NO_PRIVACY, Plan

DEMO_CLIENTS = 5
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _checked_epsilon(_ctx: click.Context, _parameter: click.Parameter, epsilon: float | None) -> float | None:
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise click.BadParameter(f"{epsilon} is not over 0 and finite; leave the option off to go without")
    return epsilon


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--clients", "n_clients", type=click.IntRange(1), help=f"How many.  [default: {DEMO_CLIENTS}]")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The federation's plan.  [default: the embedded demo's, with the data's class names]",
)
@click.option("--rounds", type=click.IntRange(1), help="How many.  [default: the plan's]")
@click.option("--seed", type=click.IntRange(0), help="Of everything that is random.  [default: the plan's]")
@click.option(
    "--data",
    metavar="SPEC",
    help="The images of all clients: a folder, a .csv or .txt list, torchvision:NAME or demo:I/N.  "
    "[default: the embedded digits]",
)
@click.option(
    "--partition",
    "way",
    type=click.Choice([str(way) for way in Partition]),
    help="How images are shared out.  [default: as the data says, else dirichlet; the digits as in pfed demo]",
)
@click.option("--beta", type=click.FloatRange(0, min_open=True), default=0.3, help="Of dirichlet: less is more skewed.")
@click.option(
    "--test-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.5, help="Of each client."
)
@click.option("--strict", is_flag=True, help="A broken image is an error, not skipped.")
@click.option("--backbone", "model", metavar="MODEL", help="open_clip model.  [default: the plan's]")
@click.option("--pretrained", metavar="TAG|FILE", help="Its weights.  [default: the plan's]")
@click.option("--backbone-dir", type=_FOLDER, metavar="DIR", help="Configuration files of models of your own.")
@click.option("--device", default="cpu", metavar="DEVICE", help="Where to compute, say cuda.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Of the frozen model.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of a client's training.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Clients that train side by side; changes no result.  [default: one for each --threads cores]",
)
@click.option("--batched", is_flag=True, help="Train all clients of a round as one stacked model.")
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Train on a Ray cluster: that at ADDRESS, or one of this machine.  [default: in this process]",
)
@click.option("--dp-epsilon", type=float, callback=_checked_epsilon, metavar="E", help="As of pfed-client, for all.")
@click.option(
    "--dp-delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="D", help="As of pfed-client."
)
@click.option("--cache", type=_FOLDER, default=Path("runs/cache"), metavar="DIR", help="Where image features are kept.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Every client's accuracy by round, and the totals.",
)
def simulate(
    n_clients: int | None,
    plan_file: Path | None,
    rounds: int | None,
    seed: int | None,
    data: str | None,
    way: str | None,
    beta: float,
    test_fraction: float,
    strict: bool,
    model: str | None,
    pretrained: str | None,
    backbone_dir: Path | None,
    device: str,
    precision: Literal["fp32", "bf16"],
    threads: int,
    workers: int | None,
    batched: bool,
    ray_address: str | None,
    dp_epsilon: float | None,
    dp_delta: float | None,
    cache: Path,
    json_file: Path | None,
) -> None:
    """A federation of many clients in this process: the code of server and clients, without network and waiting.

    One frozen model and one computation of image features serve all clients. Secure aggregation, sealed experts and
    matching are the plan's. The same plan, data, seed and --threads give the same result, also with more --workers.
    """
    if dp_delta is not None and dp_epsilon is None:
        raise click.UsageError("--dp-delta goes with --dp-epsilon")
    if batched and dp_epsilon is not None:
        raise click.UsageError("--batched does not go with --dp-epsilon: private clients draw and pay one by one")
    if batched and workers is not None:
        raise click.UsageError("--workers does not go with --batched, which trains all clients as one; try --threads")
    if ray_address is not None and (batched or dp_epsilon is not None):
        other = "--batched" if batched else "--dp-epsilon"
        why = (
            "its actors train clients one by one" if batched else "a training that is lost with its actor was paid for"
        )
        raise click.UsageError(f"--ray does not go with {other}: {why}; leave one of the two off")
    console = Console()
    plan = None if plan_file is None else Plan.from_toml(plan_file)
    drawn_by = seed if seed is not None else (demo_plan(None, None, None) if plan is None else plan).seed
    shared = _shared(data, n_clients, Partition(way) if way else None, beta, drawn_by, strict)
    images, shares = shared.images, shared.rows
    if plan is None:
        plan = demo_plan(None if data is None else images.class_names, model, pretrained)
    plan, changed = fitted(plan, len(shares), rounds, seed)
    images.relabel(plan.class_names)  # before the seconds that torch takes to load
    if plan_file is None:
        changed = []  # there is no file that could say otherwise
    for sentence in changed:
        console.print(sentence, soft_wrap=True, highlight=False)

    import torch  # takes seconds

    from pfed_cli.simulate.clients import clients_of
    from pfed_cli.simulate.report import report_of, table_of, write
    from pfed_cli.simulate.together import Together
    from pfed_cli.simulate.watching import features_bar, watching
    from pfed_cli.simulate.workers import SideBySide, Workers
    from pfed_cli.simulation import kept_prompts, with_privacy, without_privacy
    from pfed_cli.simulation import simulate as run
    from pfed_client.participant import agreed_backbone
    from pfed_client.state import Settings

    torch.set_num_threads(threads)
    settings = Settings.of(data or "demo", test_fraction=test_fraction).model_copy(
        update={"model": model, "pretrained": pretrained, "backbone_dir": backbone_dir, "precision": precision}
    )
    backbone = agreed_backbone(plan, settings, device)
    started = time.monotonic()
    with features_bar(console) as on_progress:
        clients = clients_of(
            plan, backbone, images, shares, test_fraction=test_fraction, cache=cache, on_progress=on_progress
        )
    feature_seconds = time.monotonic() - started
    place: Workers
    if batched:
        place, training = Together(plan, len(clients)), "batched"
    elif ray_address is not None:
        from pfed_cli.simulate.on_ray import OnRay, Outfit

        outfit = Outfit(plan, settings, device, threads, backbone.digest, kept_prompts(plan, len(clients)))
        features = {client.name: (client.train, client.test) for client in clients}
        place = OnRay(ray_address, outfit, features, workers)
        training = f"{place.threads} side by side on Ray"
    else:
        side_by_side = workers or max(1, len(os.sched_getaffinity(0)) // threads)
        place, training = SideBySide(side_by_side), f"{side_by_side} side by side"
    console.print(
        f"{len(clients)} clients ({shared.way}), {len(images)} images, {len(plan.class_names)} classes, "
        f"{plan.rounds.count} rounds; training {training}",
        soft_wrap=True,
        highlight=False,
    )
    if dp_epsilon is None:
        prepare = without_privacy(plan, backbone, len(clients))
    else:
        prepare = with_privacy(plan, backbone, dp_epsilon, dp_delta)
    cohort = max(plan.rounds.minimum_cohort, round(plan.rounds.participation * len(clients)))
    with watching(console, plan, cohort) as observer:
        result = run(plan, clients, backbone, prepare, workers=place, observer=observer)
    report = report_of(
        plan,
        clients,
        result,
        changed=changed,
        partition=shared.way,
        training=training,
        threads=threads,
        feature_seconds=feature_seconds,
    )
    if json_file is not None:
        write(report, json_file)
    console.print(table_of(report))
    for sentence in plan.unprotected():
        if dp_epsilon is None or sentence != NO_PRIVACY:
            console.print(f"NOT PROTECTED: {sentence}", soft_wrap=True, highlight=False)
    if dp_epsilon is not None:
        promised = sorted({client["privacy"] or "" for client in report["clients"].values()})
        console.print(f"differential privacy: {promised[0]}", soft_wrap=True, highlight=False)
    console.print(f"{report['seconds']:.0f} s, and {feature_seconds:.0f} s for image features", highlight=False)


@dataclass(frozen=True)
class _Shared:
    """All images, whose rows are whose by name, and how that came about in a word."""

    images: ImageSet
    rows: Mapping[str, Indices]
    way: str


def _shared(
    data: str | None, n_clients: int | None, way: Partition | None, beta: float, seed: int, strict: bool
) -> _Shared:
    """Raises DataError."""
    if data is None and way is None:
        images, rows = joined(digits_of(n_clients or DEMO_CLIENTS, seed))
        return _Shared(images, rows, "shares of the embedded digits")
    images = all_digits(seed) if data is None else open_images(data, strict=strict)
    if n_clients is None and images.clients is None:
        n_clients = DEMO_CLIENTS
    chosen, rows = partition(images, way, n_clients, beta, seed)
    skew = f" {beta:g}" if "dirichlet" in chosen else ""
    return _Shared(images, rows, f"{chosen}{skew}")
