"""What does privacy cost in accuracy? Epsilon, mechanism, matching and shots, beside other ways of spending epsilon.

Base design: all epsilons by both mechanisms, with the plan's own matching and all images. Then matching and shots are
varied one at a time, without privacy and at epsilon 8. The clients are real ones in one process
(`pfed_cli.simulation`): each makes its promise, solves for its noise and pays for every round from a budget on disk.
Their noise is not of the seed: a cell that is measured again gives another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .contract import Bar, Outcome, Report, Row, benchmark
from .expert_clients import DIGITS
from .expert_tasks import OFFICE, PACS
from .kept_rows import KeptRows
from .photo_features import Sources, available
from .photo_options import backbone_dir_option, cache_option, data_option, kept_option
from .privacy_cells import FEATURE_SPACE, MATCHING, SEEDS, Cell, Way, digit_cells, photo_cells, quick_cells
from .privacy_data import federation_of
from .privacy_measuring import SKETCH_EPSILON, UPLOAD_CLIP, measure

ROUNDS, QUICK_ROUNDS = 10, 2
ENOUGH_IMAGES = 100
"""The bar is for clients with as many training images at least."""
LARGEST_DROP = 5.0
"""In points, at epsilon 8."""


@benchmark
@data_option("Folder with pacs.tar and office_caltech10.tar.  [default: none, digits alone]", default=None)
@backbone_dir_option
@cache_option
@kept_option(Path("runs/privacy-utility"))
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Where a picture goes."
)
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html", help="Where a page with all goes."
)
def command(
    *,
    quick: bool,
    data: Path | None,
    backbone_dir: Path | None,
    cache_dir: Path,
    kept: Path,
    plot: Path | None,
    html: Path | None,
) -> Outcome:
    """Accuracy at epsilons from 0.5 to none, by both mechanisms, beside noise on uploads and training alone.

    On one core the digits take about an hour, and each photo data set about an hour more.
    """
    torch.set_num_threads(1)
    folder = data or Path("photographs")
    sources = Sources(folder, backbone_dir or folder / "backbone", cache_dir)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    cells = {DIGITS: quick_cells(DIGITS) if quick else digit_cells(DIGITS)}
    if not quick:
        cells |= {name: photo_cells(name) for name in available_photos(data)}
    rows: list[Row] = []
    for name, of_set in cells.items():
        rows += measure_all(name, of_set, rounds, sources, kept / f"{name}{'-quick' if quick else ''}.jsonl")
    outcome = Outcome(
        params={
            "quick": quick,
            "data_sets": list(cells),
            "seeds": sorted({cell.seed for of_set in cells.values() for cell in of_set}),
            "rounds": rounds,
            "upload_clip": UPLOAD_CLIP,
            "sketch_epsilon": SKETCH_EPSILON,
            "plans": {name: configuration(name, rounds, sources)["plan"] for name in cells},
        },
        rows=rows,
        bars=bars(rows),
    )
    report = Report.of("privacy-utility", outcome)
    if plot is not None or html is not None:
        from .privacy_report import write_page, write_plot  # matplotlib takes a while to import

        if plot is not None:
            write_plot(report, plot)
        if html is not None:
            write_page(report, html)
    return outcome


def available_photos(data: Path | None) -> list[str]:
    """The photo data sets that are in `data`; what is left out is said."""
    if data is None:
        click.echo("no --data given, so photographs are left out", err=True)
        return []
    return available((PACS, OFFICE), data)


def configuration(data_set: str, rounds: int, sources: Sources) -> dict[str, object]:
    """What kept cells of a data set must agree in; all but what a cell itself says."""
    federation = federation_of(data_set, SEEDS[0], rounds, sources)
    sections = {"prompt", "mixture", "training", "privacy", "rounds"}
    return {
        "data_set": data_set,
        "plan": federation.plan.model_dump(mode="json", by_alias=True, include=sections),
        "backbone": federation.backbone.digest,
        "images": [len(client.train) for client in federation.clients],
        "uploads": UPLOAD_CLIP,
        "sketches": SKETCH_EPSILON,
    }


def measure_all(data_set: str, cells: Sequence[Cell], rounds: int, sources: Sources, file: Path) -> list[Row]:
    """The rows of `cells`, those that were measured before from `file`. Raises BenchError, DataError."""
    kept = KeptRows(file, configuration(data_set, rounds, sources))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(data_set, total=len(cells))
        for cell in cells:
            epsilon = "no privacy" if cell.epsilon is None else f"epsilon {cell.epsilon:g}"
            progress.update(bar, description=f"{data_set}: {cell.way}, {epsilon}, seed {cell.seed}")
            rows.append(kept.get(asdict(cell), partial(measure_cell, cell, rounds, sources)))
            progress.advance(bar)
    return rows


def measure_cell(cell: Cell, rounds: int, sources: Sources) -> Row:
    """`measure`, with the cell's own federation."""
    return measure(cell, federation_of(cell.data_set, cell.seed, rounds, sources))


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """Points of mean accuracy that epsilon 8 costs, paired by seed: mean and deviation over the seeds."""
    found = {}
    for name in dict.fromkeys(str(row["data_set"]) for row in rows):
        limit = LARGEST_DROP if name == DIGITS else None
        for epsilon in (8.0, 25.0):
            drops = _drops(rows, name, Way.PFEDMOAP, FEATURE_SPACE, epsilon)
            if drops:
                found[f"{name}_drop_at_{epsilon:g}"] = _bar(drops, limit if epsilon == 8.0 else None)
        if drops := _drops(rows, name, Way.UPLOADS, None, 8.0):
            found[f"{name}_uploads_drop_at_8"] = _bar(drops, None)
    return found


def _drops(rows: Sequence[Row], data_set: str, way: Way, mechanism: str | None, epsilon: float) -> list[float]:
    """Of the base design, on digits of clients with enough images."""
    base = [
        row
        for row in rows
        if row["data_set"] == data_set and row["matching"] == MATCHING and row["shots"] is None
        if data_set != DIGITS or int(str(row["images"])) >= ENOUGH_IMAGES
    ]
    free = {row["seed"]: row for row in base if row["way"] == Way.PFEDMOAP and row["epsilon"] is None}
    return [
        100 * (float(str(free[row["seed"]]["accuracy"])) - float(str(row["accuracy"])))
        for row in base
        if (row["way"], row["mechanism"], row["epsilon"]) == (way, mechanism, epsilon) and row["seed"] in free
    ]


def _bar(values: Sequence[float], limit: float | None) -> Bar:
    return Bar.of(fmean(values), limit, "<=", deviation=stdev(values) if len(values) > 1 else None)
