"""Tails of classes, one behind the other, and groups of them."""

from __future__ import annotations

import pytest
import torch

from pfedsecure.clip.class_tails import ClassTails, groups


def tails(*lengths: int) -> ClassTails:
    """Tokens that are 0, 1, 2, … in all their places."""
    tokens = torch.arange(float(sum(lengths)))[:, None].expand(-1, 3)
    return ClassTails.of_rows(torch.zeros(3), tokens.split(list(lengths)))


def test_each_token_is_known_by_class_and_place() -> None:
    classes = tails(2, 4, 1)
    assert classes.lengths == (2, 4, 1)
    assert classes.tokens[:, 0].tolist() == list(range(7))
    assert classes.owners.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert classes.places.tolist() == [0, 1, 0, 1, 2, 3, 0]
    assert classes.ends.tolist() == [1, 5, 6]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [(2,), (4,), (1,), (3,)]),
        (4, [(2,), (4,), (1, 3)]),
        (6, [(2, 4), (1, 3)]),
        (7, [(2, 4, 1), (3,)]),
        (10, [(2, 4, 1, 3)]),
    ],
)
def test_groups_take_as_many_neighbours_as_fit(size: int, expected: list[tuple[int, ...]]) -> None:
    assert list(groups((2, 4, 1, 3), size)) == expected
    pieces = tails(2, 4, 1, 3).split(size)
    assert [piece.lengths for piece in pieces] == expected
    assert torch.cat([piece.tokens for piece in pieces])[:, 0].tolist() == list(range(10))


def test_what_fits_is_not_split() -> None:
    classes = tails(2, 4)
    (piece,) = classes.split(6)
    assert piece is classes
