"""MoE layers as functions of their tensors, in four ways to bring rows to experts, and what becomes
of one on values of its inputs other than those it was captured with.

Sizes are such that no two of them are equal by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.errors import MoeFxError
from tests.passes.graphs import captured, relative_error, rewritten_on_ranks, run_ranks

EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 4, 16, 24, 10, 2
CLOSE = 1e-4

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(tokens [T, H], weights [T, K], ids [T, K], w1 [E, H, F], w2 [E, F, H]) -> [T, H]"""


def loop(x: Tensor, w: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        rows = torch.relu(x @ w1[e]) @ w2[e]
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * rows
    return out


def gathered(x: Tensor, w: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    hidden = torch.relu(torch.einsum("th,tkhf->tkf", x, w1[ids]))
    return (torch.einsum("tkf,tkfh->tkh", hidden, w2[ids]) * w[..., None]).sum(1)


def one_hot(x: Tensor, w: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    gates = torch.zeros(len(x), EXPERTS, dtype=w.dtype).scatter_add(1, ids, w)
    hidden = torch.relu(torch.einsum("th,ehf->tef", x, w1))
    return torch.einsum("tef,efh,te->th", hidden, w2, gates)


def grouped(x: Tensor, w: Tensor, ids: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """transformers' grouped_mm, with its fallback for float32."""
    from transformers.integrations.moe import _grouped_mm

    flat = ids.reshape(-1)
    order = torch.argsort(flat)
    rows, sorted_ids = x[order // TOP_K], flat[order]
    counts = torch.histc(sorted_ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    rows = _grouped_mm(torch.relu(_grouped_mm(rows, w1, offsets)), w2, offsets)
    rows = rows * w.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return rows[inverse].view(len(x), TOP_K, -1).sum(1)


SPELLINGS: dict[str, Experts] = {
    "loop": loop,
    "gathered": gathered,
    "one_hot": one_hot,
    "grouped": grouped,
}


def random(*sizes: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * scale


def weights() -> dict[str, Tensor]:
    """The router's and the experts' matrices."""
    return {
        "gate": random(EXPERTS, HIDDEN, seed=1),
        "w1": random(EXPERTS, HIDDEN, WIDTH, seed=2, scale=HIDDEN**-0.5),
        "w2": random(EXPERTS, WIDTH, HIDDEN, seed=3, scale=WIDTH**-0.5),
    }


def route(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(x @ gate.t(), -1).topk(TOP_K)


@dataclass(frozen=True)
class Outcome:
    """verdict: "equal", "declined", or what is wrong. reasons: of what was declined."""

    verdict: str
    reasons: tuple[str, ...]
    effects: tuple[Any, ...] = ()


def outcome(
    function: Callable[..., Any],
    at_capture: tuple[Any, ...],
    others: Callable[[int], tuple[Any, ...]],
    *,
    worlds: tuple[int, ...] = (1, 2),
    dynamic: bool = False,
) -> Outcome:
    """What the passes make of ``function``, captured with ``at_capture``, on other values of the
    same inputs (``others(seed)``), on one device and with the experts shared by ranks."""
    case = captured(function, *at_capture, dynamic=dynamic)
    order = [_position(value, at_capture) for value in case.inputs]
    effects: tuple[Any, ...] = ()
    for world in worlds:
        graphs, report = rewritten_on_ranks(case.module, world, "always")
        reasons = tuple(declined.reason for declined in report.declined)
        if graphs is None:
            return Outcome("declined" if reasons else "not seen", reasons)
        effects = report.regions[0].effects
        for seed in range(3):
            inputs = []
            for rank in range(world):
                given = others(10 * seed + rank) if seed else at_capture
                inputs.append(
                    [
                        value if at is None else given[at]
                        for at, value in zip(order, case.inputs, strict=True)
                    ]
                )
            for row in inputs[1:]:  # all but the tokens is the same on every rank
                row[:] = [
                    value if at == 0 else first
                    for at, value, first in zip(order, row, inputs[0], strict=True)
                ]
            expected = [case.module(*values) for values in inputs]
            try:
                found = run_ranks(graphs, inputs)
            except (RuntimeError, IndexError, MoeFxError) as error:
                return Outcome(f"fails on {world} ranks: {error}", reasons)
            distance = relative_error(expected, found)
            if not distance <= CLOSE:
                return Outcome(f"wrong by {distance:.1e} on {world} ranks", reasons)
    return Outcome("equal", (), effects)


def _position(value: Any, given: tuple[Any, ...]) -> int | None:
    return next((at for at, other in enumerate(given) if value is other), None)
