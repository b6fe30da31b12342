"""Experts in the clear, against what is written down in them, and the plan's choice between the two ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfedsecure.errors import MessageRejected
from pfedsecure.experts.claim import Claim
from pfedsecure.experts.plain import PlainExperts, read_expert, write_expert
from pfedsecure.wire.tensors import to_tensor
from pfedsecure.wire.v1.expert_pb2 import PlainExpert
from pfedsecure.wire.v1.payload_pb2 import Tensor

SHAPE = (2, 3)
EXPERT = "cd" * 16
ContextOf = Callable[..., np.ndarray]


def written(data: np.ndarray) -> bytes:
    return PlainExpert(context=to_tensor(data.astype(np.float32))).SerializeToString()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-30, 0.02, 10.0]), st.integers(1, 2**64 - 1))
def test_what_is_packed_is_unpacked(seed: int, scale: float, number: int) -> None:
    experts = PlainExperts(SHAPE, 100.0)
    context = (np.random.default_rng(seed).normal(size=SHAPE) * scale).astype(np.float32)
    content = experts.pack(context, number)
    received = experts.unpack(content, EXPERT, number + 1)
    assert received.dtype == np.float32
    np.testing.assert_array_equal(received, context)
    assert experts.check(content, EXPERT, number) == 0
    assert len(content) <= experts.max_bytes


def test_the_numbers_stand_in_the_clear() -> None:
    context = np.arange(6, dtype=np.float32).reshape(SHAPE)
    message = PlainExpert.FromString(PlainExperts(SHAPE, 100.0).pack(context, 1))
    assert list(message.context.shape) == [2, 3]
    assert message.context.data == context.astype("<f4").tobytes()


def test_the_same_context_is_the_same_bytes_whatever_its_layout(context_of: ContextOf) -> None:
    experts = PlainExperts(SHAPE, 100.0)
    context = context_of(1)
    content = experts.pack(context, 1)
    for same in (context.copy(), np.asfortranarray(context), np.repeat(context, 2, axis=1)[:, ::2]):
        assert experts.pack(same, 1) == content
    assert experts.pack(context_of(2), 1) != content


def test_the_server_gives_out_pseudonyms_and_there_are_no_epochs() -> None:
    experts = PlainExperts(SHAPE, 100.0)
    assert (experts.claim("ab" * 32), experts.epoch) == (Claim(), 0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (16, 512), (64, 4096)])
def test_the_longest_packet(shape: tuple[int, int], context_of: ContextOf) -> None:
    experts = PlainExperts(shape, 1000.0)
    content = experts.pack(context_of(1, shape), 1)
    assert shape[0] * shape[1] * 4 < len(content) <= experts.max_bytes
    experts.check(content, EXPERT, 1)


REFUSED = [
    (b"\xff", "is not a PlainExpert"),
    (b"", r"has shape \(\), expected \(2, 3\)"),
    (written(np.ones((3, 2))), r"has shape \(3, 2\), expected \(2, 3\)"),
    (written(np.ones(6)), r"has shape \(6,\), expected \(2, 3\)"),
    (PlainExpert(context=Tensor(shape=SHAPE, data=bytes(23))).SerializeToString(), "has 23 bytes of data, expected 24"),
    (written(np.array([[1, 2, np.nan], [4, 5, 6]])), "holds numbers that are not finite"),
    (written(np.array([[1, 2, -np.inf], [4, 5, 6]])), "holds numbers that are not finite"),
    (written(np.full(SHAPE, 41)), r"has norm 100, over the plan's prompt\.max_norm 100"),
    (written(np.full(SHAPE, 3e38)), r"has norm 7\.35e\+38, over the plan's prompt\.max_norm 100"),
    (written(np.ones(SHAPE)) + b"\x12\x40" + bytes(64), "has 98 bytes, more than an expert of this plan"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_both_sides_refuse_what_cannot_be_used(content: bytes, message: str) -> None:
    experts = PlainExperts(SHAPE, 100.0)
    with pytest.raises(MessageRejected, match=f"^expert cdcdcdcd {message}"):
        experts.unpack(content, EXPERT, 2)
    with pytest.raises(MessageRejected, match=f"^the expert {message}"):
        experts.check(content, EXPERT, 1)


def test_the_norm_of_the_bound_itself_passes() -> None:
    context = np.full(SHAPE, 100 / np.sqrt(6), np.float32)
    np.testing.assert_array_equal(read_expert(write_expert(context), SHAPE, 100.0, "it"), context)
