"""Arrays on the wire, against struct as the oracle."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfedsecure.errors import MessageRejected
from pfedsecure.wire.tensors import from_tensor, to_tensor
from pfedsecure.wire.v1.payload_pb2 import Tensor

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(arrays)
def test_bytes_are_little_endian_in_c_order_and_read_back(array: np.ndarray) -> None:
    tensor = to_tensor(array)
    values = array.flatten().tolist()
    assert tensor.data == struct.pack(f"<{len(values)}f", *values)
    assert math.prod(tensor.shape) == len(values)
    back = from_tensor(Tensor.FromString(tensor.SerializeToString()), array.shape, "it")
    assert back.dtype == np.float32
    assert back.tobytes() == array.tobytes()


def test_views_and_byte_orders_travel_by_value() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(from_tensor(to_tensor(array.T), (3, 2), "it"), array.T)
    np.testing.assert_array_equal(from_tensor(to_tensor(array[:, ::2]), (2, 2), "it"), array[:, ::2])


def test_what_is_read_can_be_written_to() -> None:
    tensor = to_tensor(np.ones(3, np.float32))
    array = from_tensor(tensor, (3,), "it")
    array[:] = 0
    np.testing.assert_array_equal(from_tensor(tensor, (3,), "it"), [1, 1, 1])


def test_only_float32_travels() -> None:
    with pytest.raises(TypeError, match="not float64"):
        to_tensor(np.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(), r"the prompt has shape \(\), expected \(2, 3\)"),
        (Tensor(shape=(3, 2), data=bytes(24)), r"the prompt has shape \(3, 2\), expected \(2, 3\)"),
        (Tensor(shape=(6,), data=bytes(24)), r"the prompt has shape \(6,\), expected \(2, 3\)"),
        (Tensor(shape=(2**63, 3), data=bytes(24)), "the prompt has shape"),
        (Tensor(shape=(2, 3), data=bytes(23)), "the prompt has 23 bytes of data, expected 24"),
        (Tensor(shape=(2, 3), data=bytes(48)), "the prompt has 48 bytes of data, expected 24"),
        (Tensor(shape=(2, 3)), "the prompt has 0 bytes of data, expected 24"),
    ],
)
def test_any_other_shape_or_size_is_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(MessageRejected, match=message):
        from_tensor(tensor, (2, 3), "the prompt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    tensor = Tensor(shape=(2,), data=struct.pack("<2f", 1.0, value))
    with pytest.raises(MessageRejected, match="the prompt holds numbers that are not finite"):
        from_tensor(tensor, (2,), "the prompt")
