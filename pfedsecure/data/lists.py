"""Image lists: a CSV of path,label[,client][,domain], or lines of path<TAB>label, or DomainNet's `path index`.

Paths are relative to the folder that holds the list, or absolute. A listed file that is missing counts as a broken
image, which `verify_images` names.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pfedsecure.data.class_names import normalise_class_name
from pfedsecure.data.dataset import ImageSet
from pfedsecure.data.images import ImageFile
from pfedsecure.data.records import Record, assemble
from pfedsecure.errors import DataError

_REQUIRED = ("path", "label")
_OPTIONAL = ("client", "domain")


@dataclass(frozen=True)
class _Line:
    """A line of a list, by its number in the file."""

    number: int
    path: str
    label: str
    client: str | None = None
    domain: str | None = None


def read_csv(file: Path) -> ImageSet:
    """The images of a CSV file in UTF-8 whose header names the columns path, label and optionally client and domain.

    Raises DataError naming file and line for an unreadable file, other columns, a line with a field missing or too
    many, or an image that is listed twice.
    """
    rows = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if not set(_REQUIRED) <= set(header) <= {*_REQUIRED, *_OPTIONAL} or len(set(header)) != len(header):
            raise DataError(f"{file}: the first line must be 'path,label', with ',client' and ',domain' if need be")
        lines = []
        for fields in filter(None, rows):
            if len(fields) != len(header) or not all(field.strip() for field in fields):
                raise DataError(f"{file}, line {rows.line_num}: {len(header)} fields are needed, none of them empty")
            lines.append(_Line(rows.line_num, **dict(zip(header, map(str.strip, fields), strict=True))))
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: not CSV ({error}); correct the line") from error
    return _assemble(file, lines)


def read_list(file: Path) -> ImageSet:
    """The images of a text file in UTF-8 with a line `path<TAB>label` for each.

    DomainNet's own lists, `domain/class/image index`, are read as well: there the class is named by the folder.
    Domains are recorded if all paths are domain/class/image and their class folders agree with the labels. Raises
    DataError naming file and line for an unreadable file, a line that is neither, an index that stands for two classes,
    or an image that is listed twice.
    """
    lines = []
    class_of_index: dict[str, str] = {}
    for number, text in enumerate(_text(file).split("\n"), start=1):
        if not text.strip():
            continue
        fields = [field.strip() for field in text.split("\t")]
        if len(fields) == 2:
            path, label = fields
        else:
            path, _, index = text.strip().rpartition(" ")
            label = PurePosixPath(path).parent.name
            if len(fields) > 2 or not index.isdecimal():
                raise DataError(f"{file}, line {number}: expected path<TAB>label")
            if normalise_class_name(class_of_index.setdefault(index, label)) != normalise_class_name(label):
                raise DataError(
                    f"{file}, line {number}: label {index} is {class_of_index[index]!r} further up and {label!r} here"
                )
        lines.append(_Line(number, path, label))
    return _assemble(file, _with_domains(lines))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark first
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; check the path and who may read it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; save it as UTF-8") from error


def _with_domains(lines: list[_Line]) -> list[_Line]:
    domains = []
    for line in lines:
        parts = PurePosixPath(line.path).parts
        if len(parts) != 3 or normalise_class_name(parts[1]) != normalise_class_name(line.label):
            return lines
        domains.append(parts[0])
    return [replace(line, domain=domain) for line, domain in zip(lines, domains, strict=True)]


def _assemble(file: Path, lines: Iterable[_Line]) -> ImageSet:
    """The image set of `lines`. One image is one example, so none may be listed twice, however its path is written."""
    first: dict[str, int] = {}
    records = []
    for line in lines:
        key = PurePosixPath(os.path.normpath(line.path)).as_posix()
        if not line.path or not normalise_class_name(line.label):
            raise DataError(f"{file}, line {line.number}: both a path and a label are needed")
        if key in first:
            raise DataError(f"{file}, line {line.number}: {key} is in line {first[key]} already; keep one of them")
        first[key] = line.number
        records.append(Record(key, ImageFile(file.parent / key), line.label, line.client, line.domain))
    if not records:
        raise DataError(f"{file} lists no images")
    return assemble(records)
