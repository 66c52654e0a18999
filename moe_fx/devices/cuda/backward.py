"""The gradients of ``fused_experts`` on a GPU.

The forward has kept what comes before the activation; the activations, and tokens gathered by pair,
are made again. Each matmul is torch's grouped one or our own, as `choice` says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fx.compat import autocast_off
from moe_fx.devices.cuda.choice import BACK, GRAD, Way, backward_ways, choose
from moe_fx.devices.cuda.kernels import gemm, rows, sort
from moe_fx.devices.cuda.kernels.grad import grad_table
from moe_fx.devices.cuda.kernels.tiles import Tiles
from moe_fx.devices.cuda.launch import call, cast, key_of, known, on, recorded
from moe_fx.devices.cuda.layer import TENSORS, Layer, can_describe, can_group

__all__ = ["backward"]


def _laid_out(made: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(table).copy_(made)


def backward(
    grad: Tensor, columns: Tensor, order: Tensor, ends: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``moe_fx::fused_experts_backward``."""
    *of_layer, needed = args
    inputs, body = (grad, columns, order, ends, *of_layer[:TENSORS]), of_layer[TENSORS:]
    key = ("backward", key_of(inputs), *body, *needed)
    with on(grad):
        kind = known(key)
        if kind is not None:
            return kind.again(inputs)
        return _first(key, inputs, Layer(*of_layer), Needed(*needed))


def _first(
    key: Hashable, inputs: Sequence[Tensor | None], layer: Layer, needed: Needed
) -> tuple[Tensor, ...]:
    """A call of a kind that is not known."""
    grad, columns, order, ends, *_ = inputs
    assert grad is not None and columns is not None and order is not None and ends is not None
    if layer.ids.numel() == 0:
        return tuple(
            torch.zeros_like(each) if each is not None and need else grad.new_empty(0)
            for each, need in zip(layer.differentiable, needed, strict=True)
        )
    with autocast_off():

        def run() -> tuple[Tensor, ...]:
            wide = cast(grad, columns.dtype)
            return _Backward(layer, wide, columns, order, ends, needed).gradients()

        return recorded(key, inputs, grad.device, run)


class Needed(NamedTuple):
    """Which gradients are."""

    tokens: bool
    weights: bool
    gate_up: bool
    up: bool
    down: bool
    gate_up_bias: bool
    up_bias: bool
    down_bias: bool


@dataclass
class _Backward:
    layer: Layer
    grad: Tensor
    columns: Tensor
    order: Tensor
    ends: Tensor
    needed: Needed

    def gradients(self) -> tuple[Tensor, ...]:
        none = self.grad.new_empty(0)
        made: dict[str, Tensor] = dict.fromkeys(Needed._fields, none)
        made |= self._of_inputs(self._of_down(made))
        return tuple(made[name] for name in Needed._fields)

    def _rows(self, matmul: str, rows: Tensor, table: Tensor) -> Tensor:
        """Rows sorted by expert times ``[E, K, N]``. Rows behind are not written."""

        def run(way: Way) -> Tensor:
            if isinstance(way, Tiles):
                return gemm.plain(rows, table, self.ends, way)
            return call(torch._grouped_mm, rows, table, self.ends)

        return run(self._way(matmul, BACK, (rows, table), run))

    def _grad_table(self, matmul: str, left: Tensor, right: Tensor, table: Tensor) -> Tensor:
        """``[E, K, N]``: each expert's rows of ``left [S, K]``, transposed, times those of ``right
        [S, N]``, laid out as ``table``."""
        if table.stride(1) == 1:
            other = table.transpose(1, 2)
            return self._grad_table(matmul, right, left, other).transpose(1, 2)

        def run(way: Way) -> Tensor:
            if isinstance(way, Tiles):
                return grad_table(left, right, self.ends, way)
            return call(torch._grouped_mm, left.t(), right, self.ends)

        made = run(self._way(matmul, GRAD, (left, right), run))
        return made if made.stride() == table.stride() else call(_laid_out, made, table)

    def _way(
        self,
        matmul: str,
        tiles: Sequence[Tiles],
        operands: tuple[Tensor, Tensor],
        run: Callable[[Way], Tensor],
    ) -> Way:
        layer = self.layer
        ways = backward_ways(tiles, layer.shape, can_group(*operands), can_describe(*operands))
        return choose(matmul, layer.shape, layer.ids.shape[0], layer.tokens.device, ways, run)

    def _of_down(self, made: dict[str, Tensor]) -> Tensor:
        """The gradient of ``columns``; ``made`` gets those of down, its bias and the weights."""
        layer, order, ends, needed = self.layer, self.order, self.ends, self.needed
        weights = layer.weights
        grads = rows.gather(self.grad, order, ends, layer.top_k)
        back = self._rows("gradient of h", grads, layer.down.transpose(1, 2))
        weighted, grad_columns, products = rows.slope(
            self.columns, back, order, ends, weights, layer.body, layer.places
        )
        if needed.down:
            made["down"] = self._grad_table("gradient of down", weighted, grads, layer.down)
        if layer.down_bias is not None:
            if needed.down_bias:
                summed = rows.bias_sums(grads, order, ends, weights)
                made["down_bias"] = cast(summed, layer.down_bias.dtype)
            if products is not None:
                rows.add_bias_products(grads, order, ends, layer.down_bias, products)
        if weights is not None and products is not None and needed.weights:
            made["weights"] = cast(products, weights.dtype).view(weights.shape)
        return grad_columns

    def _of_inputs(self, grad_columns: Tensor) -> dict[str, Tensor]:
        layer, order, ends, needed = self.layer, self.order, self.ends, self.needed
        made: dict[str, Tensor] = {}
        halves = [grad_columns] if layer.up is None else list(grad_columns.chunk(2, -1))
        tables = [layer.gate_up] if layer.up is None else [layer.gate_up, layer.up]
        if needed.tokens:
            name = "gradient of rows"
            grad_rows = self._rows(name, halves[0], tables[0].transpose(1, 2))
            if layer.up is not None:
                second = self._rows(name, halves[1], tables[1].transpose(1, 2))
                grad_rows = call(torch.Tensor.add_, grad_rows, second)
            row_map = sort.inverse(order, ends)
            made["tokens"] = rows.total(grad_rows, row_map, layer.top_k, layer.tokens.dtype, True)
        if needed.gate_up or needed.up:
            gathered = rows.gather(layer.tokens, order, ends, layer.top_k)
            for name, half, table in zip(("gate_up", "up"), halves, tables, strict=False):
                if getattr(needed, name):
                    made[name] = self._grad_table("gradient of gate_up", gathered, half, table)
        biases = {"gate_up_bias": layer.gate_up_bias, "up_bias": layer.up_bias}
        for (name, bias), half in zip(biases.items(), (halves[0], halves[-1]), strict=True):
            if bias is not None and getattr(needed, name):
                made[name] = cast(rows.bias_sums(half, order, ends), bias.dtype)
        return made
