"""What every benchmark gives: one JSON object with machine, parameters, rows, and bars computed from the rows.

A benchmark is a module of this package whose `command` is made by `benchmark`. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Self

import click
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

import pfedsecure
from pfedsecure.errors import BenchError
from pfedsecure.plan import first_problem

Value = str | int | float | bool | None
Row = dict[str, Value]
Sense = Literal["<=", ">="]

_REPORTED_VERSIONS = ("torch", "open_clip_torch", "numpy", "grpcio", "cryptography", "faiss-cpu")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Bar(_Part):
    """A value that a limit may hold to. Without a limit it is only reported, and `ok`."""

    value: float
    limit: float | None
    sense: Sense
    ok: bool
    deviation: float | None = None
    """Standard deviation of the value over the benchmark's seeds, where there are several."""

    @classmethod
    def of(cls, value: float, limit: float | None, sense: Sense, *, deviation: float | None = None) -> Self:
        """The bar with its verdict."""
        return cls(value=value, limit=limit, sense=sense, ok=_holds(value, limit, sense), deviation=deviation)

    @property
    def rounded(self) -> str:
        """Value and deviation, to two digits behind the point."""
        return f"{self.value:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")

    @property
    def verdict(self) -> str:
        """The limit, and whether the value keeps it."""
        return "no limit" if self.limit is None else f"{self.sense} {self.limit:g}: {'ok' if self.ok else 'missed'}"

    @model_validator(mode="after")
    def _verdict_follows(self) -> Self:
        if self.ok != _holds(self.value, self.limit, self.sense):
            raise ValueError(f"ok is {self.ok} for {self.value} {self.sense} {self.limit}")
        return self


def _holds(value: float, limit: float | None, sense: Sense) -> bool:
    if limit is None:
        return True
    return value <= limit if sense == "<=" else value >= limit


class Machine(_Part):
    """What a benchmark ran on. `gpu` is None where none was used."""

    cpu: str
    cores: int
    gpu: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What a benchmark's function returns; `gpu` names the device it used, if any."""

    params: Mapping[str, object]
    rows: list[Row]
    bars: Mapping[str, Bar]
    gpu: str | None = None


class Report(_Part):
    """The JSON object of one run."""

    bench: str
    version: str
    machine: Machine
    params: dict[str, object]
    rows: list[Row]
    bars: dict[str, Bar]

    @classmethod
    def of(cls, bench: str, outcome: Outcome) -> Self:
        return cls(
            bench=bench,
            version=pfedsecure.__version__,
            machine=this_machine(outcome.gpu),
            params=dict(outcome.params),
            rows=outcome.rows,
            bars=dict(outcome.bars),
        )

    @classmethod
    def read(cls, file: Path) -> Self:
        """A report from its file. Raises BenchError, in one line, for anything else."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise BenchError(f"{file}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            raise BenchError(f"{file}: not the JSON of `pfed bench` ({first_problem(error)})") from None

    def write(self, file: Path) -> None:
        """Raises BenchError when `file` cannot be written."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.model_dump_json(indent=1) + "\n")
        except OSError as error:
            raise BenchError(f"{file}: cannot be written ({error.strerror}); give another --json") from None


def this_machine(gpu: str | None = None) -> Machine:
    """The machine that this process runs on."""
    return Machine(
        cpu=_cpu_name(),
        cores=_usable_cores(),
        gpu=gpu,
        versions={"python": platform.python_version()} | {name: metadata.version(name) for name in _REPORTED_VERSIONS},
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def benchmark(function: Callable[..., Outcome]) -> click.Command:
    """The command of a benchmark: `function(quick=..., **its own options)`, `--quick`, and the report in `--json FILE`.

    Its name is that of the module, with dashes; its help is the function's docstring; its own options are click's
    decorators on it.
    """
    name = function.__module__.rpartition(".")[2].replace("_", "-")

    @functools.wraps(function)  # takes over the options, which click keeps on the function
    def run(*, quick: bool, json_file: Path, **options: object) -> None:
        report = Report.of(name, function(quick=quick, **options))
        report.write(json_file)
        for bar, found in report.bars.items():
            click.echo(f"{bar}: {_in_words(found)}")
        click.echo(f"{len(report.rows)} rows in {json_file}")

    quick_option = click.option("--quick", is_flag=True, help="A small part of it, within a minute.")
    json_option = click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        required=True,
        help="Where the report goes.",
    )
    return click.command(name)(json_option(quick_option(run)))


def _in_words(bar: Bar) -> str:
    value = f"{bar.value:.4g}" + ("" if bar.deviation is None else f" ± {bar.deviation:.2g}")
    if bar.limit is None:
        return f"{value} (no limit)"
    return f"{value} ({bar.sense} {bar.limit:g}: {'ok' if bar.ok else 'MISSED'})"
