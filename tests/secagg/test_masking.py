from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pfedsecure.errors import MessageRejected
from pfedsecure.secagg import Step, Update, keys
from pfedsecure.secagg.masking import Masks, pair_info, self_info
from pfedsecure.wire.v1 import secagg_pb2 as wire


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_what_is_added_can_be_subtracted_in_the_ring(dtype: type) -> None:
    masks = Masks(9, np.dtype(dtype))
    vector = np.arange(9, dtype=dtype)
    masks.add(vector, b"k" * 32)
    assert (vector != np.arange(9)).all()
    masks.subtract(vector, b"k" * 32)
    assert vector.tolist() == list(range(9))


def test_infos_tell_pairs_rounds_and_purposes_apart() -> None:
    one, other = b"1" * 32, b"2" * 32
    infos = [pair_info(one, 1, 2), pair_info(one, 1, 3), pair_info(other, 1, 2), self_info(one, 1), self_info(one, 2)]
    assert len(set(infos)) == len(infos)
    assert pair_info(one, 2, 1) == pair_info(one, 1, 2)


def test_both_sides_agree_on_a_key_and_small_order_keys_are_refused() -> None:
    mine, yours = b"a" * 32, b"b" * 32
    assert keys.Agreement(mine).secret(keys.public_key(yours), "you") == keys.Agreement(yours).secret(
        keys.public_key(mine), "me"
    )
    with pytest.raises(MessageRejected, match="the X25519 key of you is of small order"):
        keys.Agreement(mine).secret(bytes(32), "you")


def test_sealed_messages_open_for_their_key_and_context_alone() -> None:
    sealed = keys.seal(b"k" * 32, b"share", b"context", lambda count: bytes(count))
    assert keys.unseal(b"k" * 32, sealed, b"context") == b"share"
    assert keys.unseal(b"j" * 32, sealed, b"context") is None
    assert keys.unseal(b"k" * 32, sealed, b"another") is None
    assert keys.unseal(b"k" * 32, sealed[:-1], b"context") is None


def test_no_two_masks_share_their_keystream(
    new_round: Callable[..., Any], update_of: Callable[..., Update], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two rounds of the same clients: keys of 256 bits, each used by the clients that it belongs to only."""
    used: list[bytes] = []
    stream = Masks._stream
    monkeypatch.setattr(Masks, "_stream", lambda self, key: used.append(key) or stream(self, key))
    for number in (1, 2):
        this = new_round(6, number=number)
        this.advertise()
        this.share()
        this.mask({name: update_of(0) for name in this.names})
    counts = Counter(used)
    assert {len(key) for key in counts} == {32}
    assert Counter(counts.values()) == {1: 2 * 6, 2: 2 * 15}  # own masks once, pairwise masks twice
    blocks = Counter(
        stream(Masks(256, np.dtype(np.uint32)), key)[i : i + 4].tobytes() for key in counts for i in range(0, 256, 4)
    )
    assert set(blocks.values()) == {1}


def test_masked_vectors_look_uniform_whatever_is_in_them(new_round: Callable[..., Any]) -> None:
    this = new_round(3, values=20_000)
    zeros, ones = (Update(np.full(20_000, value, np.float32), 1000) for value in (0, 1))
    this.advertise()
    this.share()
    this.mask({"c00": zeros, "c01": zeros, "c02": ones})
    seen = [
        np.frombuffer(wire.MaskedInput.FromString(this.stored[Step.MASK][name]).vector, np.uint8)
        for name in ("c00", "c01", "c02")
    ]
    for data in seen:
        counts = np.bincount(data, minlength=256)
        assert ((counts - len(data) / 256) ** 2 / (len(data) / 256)).sum() < 400  # 255 degrees of freedom: 1e-8
        assert abs(np.unpackbits(data).mean() - 0.5) < 6 * 0.5 / np.sqrt(8 * len(data))
    for one, other in ((0, 1), (0, 2)):
        agreement = (seen[one] == seen[other]).mean()
        assert abs(agreement - 1 / 256) < 6 * np.sqrt(1 / 256 / len(seen[one]))
