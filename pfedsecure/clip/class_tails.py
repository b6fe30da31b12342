"""What follows the context in a prompt, for every class: its name, ".", and EOT.

Symbols: C classes, N tokens of all tails together, d text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassTails:
    """Embeddings `(N, d)` of the tails of all classes, one behind the other, and how many tokens each of them has.

    `sos` is the embedding `(d,)` that precedes the context. A tail ends with its EOT.
    """

    sos: Tensor
    tokens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, sos: Tensor, rows: Sequence[Tensor]) -> ClassTails:
        """From one `(t_c, d)` array of embeddings per class, each ending with EOT."""
        return cls(sos, torch.cat(list(rows)), tuple(len(row) for row in rows))

    @cached_property
    def owners(self) -> Tensor:
        """Which class each token is of, `(N,)`."""
        return torch.repeat_interleave(torch.tensor(self.lengths)).to(self.sos.device)

    @cached_property
    def places(self) -> Tensor:
        """Which token of its tail each one is, `(N,)`, from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.sos.device)

    @cached_property
    def ends(self) -> Tensor:
        """Where each class's EOT is among the N, `(C,)`."""
        return torch.tensor(list(accumulate(self.lengths))).to(self.sos.device) - 1

    def split(self, size: int) -> list[ClassTails]:
        """The same classes, up to `size` tokens of them at a time, or one class if that alone has more."""
        pieces, first, start = [], 0, 0
        for group in groups(self.lengths, size):
            stop = start + sum(group)
            pieces.append(ClassTails(self.sos, self.tokens[start:stop], self.lengths[first : first + len(group)]))
            first, start = first + len(group), stop
        return [self] if len(pieces) == 1 else pieces


def groups(lengths: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Neighbours of `lengths` whose sum is `size` at most, as many as fit, or a single one that is longer."""
    group: list[int] = []
    total = 0
    for length in lengths:
        if group and total + length > size:
            yield tuple(group)
            group, total = [], 0
        group.append(length)
        total += length
    if group:
        yield tuple(group)
