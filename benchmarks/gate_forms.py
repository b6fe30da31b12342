"""Three ways of computing the same gate, timed in turns: ours, PyTorch's fused attention, and a copy for every class.

Symbols: B images, C classes, K experts, g gate width, h heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsecure.moe.gate import Gate

from .contract import Row
from .published_way import gate_by_class

WIDTH, HEADS, SCALE = 128, 8, 10.0
TURNS = 15


def gate_rows(classes: int, batch: int, experts: int, device: str) -> list[Row]:
    """A row for each form: milliseconds of a forward and a backward pass, and numbers that are kept in between."""
    generator = torch.Generator().manual_seed(1)
    gate = Gate(WIDTH, HEADS, SCALE, generator).to(device)
    queries = F.normalize(torch.randn(batch, WIDTH, generator=generator), dim=-1).to(device)
    keys = F.normalize(torch.randn(classes, experts + 1, WIDTH, generator=generator), dim=-1).to(device)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda of: gate(queries, of),
        "fused": lambda of: torch.einsum("bg,bcg->bc", queries, _fused(gate, queries, of)),
        "copies": lambda of: torch.einsum("bg,bcg->bc", queries, gate_by_class(gate, queries, of)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    kept: dict[str, int] = {}
    for _ in range(TURNS + 1):
        for name, form in forms.items():
            took, kept[name] = _timed(form, keys, gate)
            seconds[name].append(took)
    return [
        {
            "kind": "gate",
            "form": name,
            "classes": classes,
            "batch": batch,
            "experts": experts,
            "ms": 1e3 * median(took[1:]),
            "kept_over_bcg": kept[name] / (batch * classes * WIDTH),
        }
        for name, took in seconds.items()
    ]


def _fused(gate: Gate, queries: Tensor, experts: Tensor) -> Tensor:
    """M `(B, C, g)` by `scaled_dot_product_attention`, with queries projected once and classes as its batch."""
    n_classes = len(experts)

    def heads(x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (gate.heads, -1))
        return split.transpose(-3, -2)

    q = heads(gate.W_q(queries)).expand(n_classes, -1, -1, -1)  # (C, h, B, e)
    out = F.scaled_dot_product_attention(
        q, heads(gate.W_k(experts)), heads(gate.W_v(experts)), scale=gate.attention_scale
    )
    mixed: Tensor = gate.W_o(out.transpose(1, 2).flatten(2))
    return mixed.transpose(0, 1)


def _timed(form: Callable[[Tensor], Tensor], keys: Tensor, gate: Gate) -> tuple[float, int]:
    """Seconds of both passes, and how many numbers were kept for the backward one, besides the parameters."""
    sizes: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gate.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    inputs = keys.clone().requires_grad_()
    started = _now(keys.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = form(inputs)
    result.sum().backward()
    return _now(keys.device) - started, sum(sizes.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
