"""``fused_experts`` on a GPU: sort, gate and up, down, weighted sum.

Each of the two matmuls is one of our kernels in some tiling (`kernels/gemm.py`), or torch's grouped
matmul on gathered rows, whichever `choice` says for so many tokens. They meet in ``h [S, I]``, rows
sorted by expert, so they are chosen apart.

Nothing waits for the host, and what is launched does not depend on values: all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fx.compat import autocast_off
from moe_fx.devices.cuda.choice import Way, way
from moe_fx.devices.cuda.kernels import gemm, rows, sort
from moe_fx.devices.cuda.launch import empty, key_of, known, not_recorded, on, recorded
from moe_fx.devices.cuda.layer import Layer

__all__ = ["forward", "forward_training"]

_TENSORS = 9
"""The op's first arguments."""


@dataclass
class _Run:
    """One call. order, row_map, ends: of `sort.sort_pairs`."""

    layer: Layer
    order: Tensor
    row_map: Tensor
    ends: Tensor

    @classmethod
    def of(cls, layer: Layer) -> _Run:
        return cls(layer, *sort.sort_pairs(layer.ids, layer.experts))

    def activations(self, way: Way, columns: Tensor | None = None) -> Tensor:
        """``h [S, I]``. columns ``[S, N]``: gets what comes before the activation."""
        layer = self.layer
        if isinstance(way.gate_up, gemm.Tiles):
            return gemm.gate_up(
                layer.tokens, self.order, self.ends, *layer.halves, *layer.bias_halves,
                layer.top_k, layer.body, way.gate_up, layer.places, columns,
            )  # fmt: skip
        not_recorded()
        gathered = rows.gather(layer.tokens, self.order, self.ends, layer.top_k)
        if layer.up is None and columns is None:
            columns = torch._grouped_mm(gathered, layer.gate_up, self.ends)
        else:
            columns = self.columns(gathered, columns)
        return rows.activate(columns, self.ends, *layer.bias_halves, layer.body, layer.places)

    def columns(self, gathered: Tensor, out: Tensor | None) -> Tensor:
        layer = self.layer
        made = [torch._grouped_mm(gathered, layer.gate_up, self.ends)]
        if layer.up is not None:
            made.append(torch._grouped_mm(gathered, layer.up, self.ends))
        if out is None:
            return torch.cat(made, -1)
        return torch.cat(made, -1, out=out) if len(made) > 1 else out.copy_(made[0])

    def result(self, way: Way, h: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(way.down, gemm.Tiles):
            pairs = gemm.down(
                h, self.order, self.ends, layer.weights, layer.down, layer.down_bias, way.down
            )
            return rows.total(pairs, self.row_map, layer.top_k, layer.dtype, mapped=False)
        not_recorded()
        results = torch._grouped_mm(h, layer.down, self.ends)
        return rows.total(
            results, self.row_map, layer.top_k, layer.dtype, True, layer.weights, layer.ids,
            layer.down_bias,
        )  # fmt: skip


def forward(*args: Any) -> Tensor:
    """``moe_fx::fused_experts``."""
    inputs, body = args[:_TENSORS], args[_TENSORS:]
    key = (key_of(inputs), body)
    with on(inputs[0]):
        kind = known(key)
        if kind is not None:
            return kind.again(inputs)[0]
        return _first(key, Layer(*args), inputs)


def _first(key: Hashable, layer: Layer, inputs: Sequence[Tensor | None]) -> Tensor:
    """A call of a kind that is not known."""
    if layer.ids.numel() == 0:
        return _nothing(layer)
    with autocast_off():
        chosen, measured = _way(layer)

        def run() -> tuple[Tensor]:
            of_call = _Run.of(layer)
            return (of_call.result(chosen, of_call.activations(chosen)),)

        if not measured:
            return run()[0]
        return recorded(key, inputs, layer.tokens.device, run)[0]


def forward_training(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``moe_fx::fused_experts_training``."""
    layer = Layer(*args)
    pairs, width = layer.ids.numel(), layer.places.width
    sizes = (pairs, width * (2 if layer.places.gated else 1))
    if pairs == 0:
        return (
            _nothing(layer),
            layer.tokens.new_empty(sizes),
            layer.ids.new_empty((0,), dtype=torch.int32),
            layer.ids.new_zeros((layer.experts,), dtype=torch.int32),
        )
    with on(layer.tokens), autocast_off():
        chosen, _ = _way(layer)
        run = _Run.of(layer)
        columns = empty(sizes, layer.tokens.dtype, layer.tokens.device)
        result = run.result(chosen, run.activations(chosen, columns))
        return result, columns, run.order, run.ends


def _nothing(layer: Layer) -> Tensor:
    sizes = (layer.tokens.shape[0], layer.down.shape[2])
    return layer.tokens.new_zeros(sizes, dtype=layer.dtype)


def _way(layer: Layer) -> tuple[Way, bool]:
    """The way to run it, and whether it stays that way."""
    run: list[_Run] = []  # sorted when something is to be measured, not before

    def activations(each: Way) -> Tensor:
        run.extend(() if run else (_Run.of(layer),))
        return run[0].activations(each)

    return way(
        layer.shape,
        layer.tokens.shape[0],
        layer.tokens.device,
        activations,
        lambda each, h: run[0].result(each, h),
    )
