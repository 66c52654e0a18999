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
from typing import Any, Self

import torch
from torch import Tensor

from moe_fx.compat import autocast_off
from moe_fx.devices.cuda.choice import Way, choose, forward_ways
from moe_fx.devices.cuda.kernels import gemm, rows, sort
from moe_fx.devices.cuda.kernels.tiles import Tiles
from moe_fx.devices.cuda.launch import call, empty, key_of, known, on, recorded
from moe_fx.devices.cuda.layer import TENSORS, Layer

__all__ = ["Run", "forward", "forward_training"]


@dataclass
class Run:
    """One call. order, row_map, ends: of `sort.sort_pairs`. keeps: the columns before the
    activation, for training. num_tokens: those that matter for how fast a way is."""

    layer: Layer
    keeps: bool
    order: Tensor
    row_map: Tensor
    ends: Tensor
    num_tokens: int

    @classmethod
    def of(cls, layer: Layer, keeps: bool, num_tokens: int) -> Self:
        return cls(layer, keeps, *sort.sort_pairs(layer.ids, layer.experts), num_tokens)

    def results(self) -> tuple[Tensor, ...]:
        layer = self.layer
        ups, downs = forward_ways(layer.shape, self.num_tokens)
        of = (layer.shape, self.num_tokens, layer.tokens.device)
        name = "gate_up, kept" if self.keeps else "gate_up"
        h, columns = self.activations(choose(name, *of, ups, self.activations))
        out = self.total(h, choose("down", *of, downs, lambda way: self.total(h, way)))
        return (out,) if columns is None else (out, columns, self.order, self.ends)

    def activations(self, way: Way) -> tuple[Tensor, Tensor | None]:
        """``h [S, I]`` and, where it ``keeps`` them, the columns ``[S, N]``."""
        layer = self.layer
        if isinstance(way, Tiles):
            columns = None
            if self.keeps:
                columns = empty(layer.sizes, layer.tokens.dtype, layer.tokens.device)
            h = gemm.gate_up(
                layer.tokens, self.order, self.ends, *layer.halves, *layer.bias_halves,
                layer.top_k, layer.body, way, layer.places,
                layer.gate_up, layer.layout, columns,
            )  # fmt: skip
            return h, columns
        gathered = rows.gather(layer.tokens, self.order, self.ends, layer.top_k)
        columns = call(torch._grouped_mm, gathered, layer.gate_up, self.ends)
        if layer.up is not None:
            columns = call(
                _side_by_side, columns, call(torch._grouped_mm, gathered, layer.up, self.ends)
            )
        h = rows.activate(columns, self.ends, *layer.bias_halves, layer.body, layer.places)
        return h, columns if self.keeps else None

    def pairs(self, h: Tensor, way: Way) -> tuple[Tensor, bool]:
        """The experts' results: by pair, with biases and times the weights; or, True, sorted by
        expert, without."""
        layer = self.layer
        if not isinstance(way, Tiles):
            return call(torch._grouped_mm, h, layer.down, self.ends), True
        weights, bias = layer.weights, layer.down_bias
        return gemm.down(h, self.order, self.ends, weights, layer.down, bias, way), False

    def total(self, h: Tensor, way: Way) -> Tensor:
        layer = self.layer
        pairs, mapped = self.pairs(h, way)
        given = (layer.weights, layer.ids, layer.down_bias) if mapped else ()
        return rows.total(pairs, self.row_map, layer.top_k, layer.dtype, mapped, *given)


def _side_by_side(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up], -1)


def forward(*args: Any) -> Tensor:
    """``moe_fx::fused_experts``."""
    return _fused(args, trains=False)[0]


def forward_training(*args: Any) -> tuple[Tensor, ...]:
    """``moe_fx::fused_experts_training``."""
    return _fused(args, trains=True)


def _fused(args: tuple[Any, ...], trains: bool) -> tuple[Tensor, ...]:
    inputs, body = args[:TENSORS], args[TENSORS:]
    key = (trains, key_of(inputs), body)
    with on(inputs[0]):
        kind = known(key)
        if kind is not None:
            return kind.again(inputs)
        return _first(key, Layer(*args), inputs, trains)


def _first(
    key: Hashable, layer: Layer, inputs: Sequence[Tensor | None], trains: bool
) -> tuple[Tensor, ...]:
    """A call of a kind that is not known."""
    if layer.ids.numel() == 0:
        return _nothing(layer)
    with autocast_off():
        device = layer.tokens.device
        return recorded(key, inputs, device, lambda: _run(layer, trains))


def _run(layer: Layer, trains: bool) -> tuple[Tensor, ...]:
    return Run.of(layer, trains, layer.tokens.shape[0]).results()


def _nothing(layer: Layer) -> tuple[Tensor, ...]:
    """Of no tokens, all that training asks for."""
    return (
        layer.tokens.new_zeros((layer.tokens.shape[0], layer.down.shape[2]), dtype=layer.dtype),
        layer.tokens.new_empty(layer.sizes),
        layer.ids.new_empty((0,), dtype=torch.int32),
        layer.ids.new_zeros((layer.experts,), dtype=torch.int32),
    )
