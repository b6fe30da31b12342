"""The options that benchmarks on photographs have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
_FOLDER = click.Path(file_okay=False, path_type=Path)


def data_option(content: str, *, default: Path | None = Path("photographs")) -> Callable[[F], F]:
    """`--data`, a folder with `content`; None without it, where `default` is None."""
    return click.option("--data", type=_FOLDER, default=default, show_default=default is not None, help=content)


backbone_dir_option = click.option(
    "--backbone-dir",
    type=_FOLDER,
    help="Folder with MODEL.json and MODEL.safetensors for photographs.  [default: DATA/backbone]",
)

cache_option = click.option(
    "--cache",
    "cache_dir",
    type=_FOLDER,
    default=Path("runs/cache"),
    show_default=True,
    help="Where unpacked images and their features are kept.",
)


def kept_option(default: Path) -> Callable[[F], F]:
    """`--kept`, where a long benchmark has what it measured so far."""
    return click.option(
        "--kept",
        type=_FOLDER,
        default=default,
        show_default=True,
        help="Where what is finished is kept: a run that was broken off goes on there.",
    )
