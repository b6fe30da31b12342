"""float32 arrays on the wire. No pickle; the receiver, not the sender, says which shape it takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.v1.payload_pb2 import Tensor

_LITTLE_ENDIAN_FLOAT32 = np.dtype("<f4")
_ROUNDING = 1e-5
"""Relative error that float32 may add to a norm that was scaled to the bound."""


def to_tensor(array: NDArray[np.float32]) -> Tensor:
    """Copy a float32 array of any shape into a message."""
    if array.dtype != np.float32:
        raise TypeError(f"only float32 travels, not {array.dtype}")
    data = np.ascontiguousarray(array, dtype=_LITTLE_ENDIAN_FLOAT32).tobytes()
    return Tensor(shape=array.shape, data=data)


def from_tensor(tensor: Tensor, shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """The array of a message that must have exactly this shape and only finite numbers.

    `what` names the array in the error. Raises MessageRejected.
    """
    if tuple(tensor.shape) != shape:
        raise MessageRejected(f"{what} has shape {tuple(tensor.shape)}, expected {shape}")
    expected = int(np.prod(shape, dtype=np.int64)) * _LITTLE_ENDIAN_FLOAT32.itemsize
    if len(tensor.data) != expected:
        raise MessageRejected(f"{what} has {len(tensor.data)} bytes of data, expected {expected}")
    array = np.frombuffer(tensor.data, dtype=_LITTLE_ENDIAN_FLOAT32).reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        raise MessageRejected(f"{what} holds numbers that are not finite")
    return array


def bounded(array: NDArray[np.float32], max_norm: float) -> NDArray[np.float32]:
    """`array`, scaled to Euclidean norm `max_norm` if it is over that; then `check_norm` accepts it."""
    norm = float(np.linalg.norm(array.astype(np.float64)))
    return array if norm <= max_norm else (array * (max_norm / norm)).astype(np.float32)


def check_norm(array: NDArray[np.float32], max_norm: float, what: str) -> None:
    """Refuse an array whose Euclidean norm is over `max_norm`: one huge number would make everybody's training diverge.

    `what` names the array in the error. Raises MessageRejected.
    """
    norm = float(np.linalg.norm(array.astype(np.float64)))
    if norm > max_norm * (1 + _ROUNDING):
        raise MessageRejected(f"{what} has norm {norm:.3g}, over the plan's prompt.max_norm {max_norm:g}")
