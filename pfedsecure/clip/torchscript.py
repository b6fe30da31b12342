"""The weights of a TorchScript archive, the form in which OpenAI published CLIP, read without running what is in it.

`torch.jit.load` compiles and runs code of the archive (a `__setstate__`), so a checkpoint could do anything the
user can. Here the archive is a zip file of storages and a pickle that says which tensor lies where; the pickle may name
nothing but tensors, lists and modules, and modules are read as plain collections of named parts.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_DAMAGED = (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, IndexError, EOFError, RuntimeError)
"""What reading a damaged archive ends in; ValueError besides."""


def is_torchscript(path: Path) -> bool:
    """Whether `path` is a TorchScript archive; a checkpoint of `torch.save` is a zip file too, but has no code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the archive by their dotted names, as `state_dict` would give them, and non-persistent ones too.

    Raises ValueError for an archive that is damaged or holds anything else than modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = _Unpickler(archive, data.removesuffix("data.pkl")).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        IndexError,
        EOFError,
        RuntimeError,
    ) as error:
        raise ValueError(str(error)) from None
    return dict(_walk(root, ""))


class _Module:
    """A module of the archive: whatever its class, no more than its parts."""

    parts: object = None

    def __setstate__(self, parts: object) -> None:
        self.parts = parts


def _walk(value: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    parts = value.parts if isinstance(value, _Module) else None
    if isinstance(parts, dict):
        for name, part in parts.items():
            if isinstance(part, Tensor):
                yield f"{prefix}{name}", part
            else:
                yield from _walk(part, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which weights do not need")

    def persistent_load(self, identifier: Any) -> Tensor:
        _, dtype, key, _, count = identifier
        if not (isinstance(dtype, torch.dtype) and str(key).isdigit()):
            raise pickle.UnpicklingError("it holds a storage of unknown form")
        content = bytearray(self._archive.read(f"{self._folder}data/{key}"))
        return torch.frombuffer(content, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _same(value: object, *_: object) -> object:
    return value


_ALLOWED: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.jit._pickle", "build_intlist"): _same,
    ("torch.jit._pickle", "build_doublelist"): _same,
    ("torch.jit._pickle", "build_boollist"): _same,
    ("torch.jit._pickle", "build_tensorlist"): _same,
    ("torch.jit._pickle", "restore_type_tag"): _same,
}
