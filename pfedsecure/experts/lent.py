"""What a client lends: one array in rows as wide as a prompt, so that every way of lending carries it alike.

In the paper's form that is the context `(n, d)` and nothing else. In an ensemble the expert is a whole classifier:
behind the context come the `C * g` numbers that the author's gate makes of its own prompt's text features, filled up
with zeros to whole rows, `(n + r, d)`. Symbols: n x d context, K experts, C classes, g gate width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pfedsecure.plan import Plan

Array = NDArray[np.float32]


def lent_shape(plan: Plan, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of what is lent, for contexts of `shape (n, d)`."""
    length, width = shape
    if plan.mixture.form == "ensemble":
        length += -(-len(plan.class_names) * plan.mixture.gate_width // width)
    return length, width


def lend(plan: Plan, context: Array, gate_output: Array) -> Array:
    """The array of an ensemble's expert: `context (n, d)` and `gate_output (C, g)`."""
    lent = np.zeros(lent_shape(plan, (context.shape[0], context.shape[1])), np.float32)
    lent[: len(context)] = context
    lent[len(context) :].flat[: gate_output.size] = gate_output.ravel()
    return lent


def contexts(plan: Plan, experts: Array) -> Array:
    """The contexts `(K, n, d)` of what was lent."""
    return experts[:, : plan.prompt.context_length]


def gate_outputs(plan: Plan, experts: Array) -> Array:
    """The gates' outputs `(K, C, g)` of an ensemble's experts."""
    n_classes, gate_width = len(plan.class_names), plan.mixture.gate_width
    behind = experts[:, plan.prompt.context_length :]
    flat = behind.reshape(len(experts), behind.shape[1] * behind.shape[2])
    return flat[:, : n_classes * gate_width].reshape(len(experts), n_classes, gate_width)
