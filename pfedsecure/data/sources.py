"""From what a user types after `--data` to an image set."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.folders import read_folder
from pfedsecure.data.images import ImagePixels
from pfedsecure.data.lists import read_csv, read_list
from pfedsecure.data.records import Record, assemble
from pfedsecure.data.torchvision_sets import read_torchvision
from pfedsecure.data.verification import verify_images
from pfedsecure.errors import DataError

_TORCHVISION = "torchvision:"
_DEMO = "demo:"
_LIST_READERS = {".csv": read_csv, ".txt": read_list}


def open_images(spec: str, *, strict: bool, root: Path | None = None) -> ImageSet:
    """The images that `spec` names, all of them decodable, of two classes or more.

    | `spec` | source |
    |---|---|
    | a folder | CLASS/IMAGE or DOMAIN/CLASS/IMAGE |
    | FILE.csv | columns path, label, optionally client and domain |
    | FILE.txt | path, tabulator, label on each line; or DomainNet's `path index` |
    | `torchvision:NAME[:FOLDER]` | a torchvision data set kept in FOLDER (default `data`), downloaded if absent |
    | `demo:INDEX/OF[:SEED]` | the share of client INDEX (from 0) of OF in the embedded handwritten digits (seed 0) |

    Relative paths start from `root`, by default the working directory. An image that cannot be decoded is named in a
    warning of the logger `pfedsecure.data` and left out, or is an error with `strict`.

    Raises DataError, in one line, for whatever makes the data unusable.
    """
    image_set = verify_images(_read(spec, root or Path()), strict=strict)
    present = np.unique(image_set.labels)
    if len(present) < 2:
        raise DataError(
            f"all images of {spec} are of one class, {image_set.class_names[present[0]]!r}; "
            "a classifier needs two classes or more"
        )
    return image_set


def _read(spec: str, root: Path) -> ImageSet:
    if not spec:
        raise DataError("no data is named; give a folder, a .csv or .txt list, torchvision:NAME or demo:INDEX/OF")
    if spec.startswith(_TORCHVISION):
        name, _, folder = spec.removeprefix(_TORCHVISION).partition(":")
        return read_torchvision(name.lower(), root / os.path.expanduser(folder or "data"))
    if spec.startswith(_DEMO):
        return _read_demo(spec)
    path = root / os.path.expanduser(spec)
    if path.suffix.lower() in _LIST_READERS and not os.path.isdir(path):
        return _LIST_READERS[path.suffix.lower()](path)
    if os.path.isfile(path):
        raise DataError(f"{path} is neither a folder, nor a .csv nor a .txt list of images")
    return read_folder(path)


def _read_demo(spec: str) -> ImageSet:
    match = re.fullmatch(r"demo:(\d+)/(\d+)(?::(\d+))?", spec)
    if match is None:
        raise DataError(
            f"{spec!r} is not a demo share; write demo:INDEX/OF or demo:INDEX/OF:SEED, for example demo:0/5"
        )
    index, n_clients, seed = (int(group or 0) for group in match.groups())
    from pfedsecure.data.digits import CLASS_NAMES, demo_share  # loads scikit-learn

    share = demo_share(index, n_clients, seed)
    return assemble(
        Record(
            f"scan/{scan:04d}",
            ImagePixels(np.asarray(image.convert("RGB"))),
            CLASS_NAMES[label],
            domain=share.condition,
        )
        for image, label, scan in zip(share.images, share.labels, share.indices, strict=True)
    )
