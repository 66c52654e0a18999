"""The gradients of ``fused_experts`` on a GPU.

The forward has kept what comes before the activation; the activations, and tokens gathered by pair,
are made again. Matmuls are torch's grouped ones where those take the operands, else our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fx.compat import autocast_off
from moe_fx.devices.cuda.kernels import gemm, rows, sort
from moe_fx.devices.cuda.launch import on
from moe_fx.devices.cuda.layer import Layer, can_group

__all__ = ["backward"]


def _multiply(grad: Tensor, table: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times ``[E, K, N]``. Rows behind are not written."""
    if can_group(grad, table):
        return torch._grouped_mm(grad, table, ends)
    return gemm.plain(grad, table, ends)


def _grad_table(left: Tensor, right: Tensor, ends: Tensor, table: Tensor) -> Tensor:
    """``[E, K, N]``: each expert's rows of ``left [S, K]``, transposed, times those of ``right
    [S, N]``, laid out as ``table``."""
    if table.stride(1) == 1:
        return _grad_table(right, left, ends, table.transpose(1, 2)).transpose(1, 2)
    if can_group(left, right):
        made = torch._grouped_mm(left.t(), right, ends)
    else:
        made = gemm.grad_table(left, right, ends)
    return made if made.stride() == table.stride() else torch.empty_like(table).copy_(made)


def backward(
    grad: Tensor, columns: Tensor, order: Tensor, ends: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``moe_fx::fused_experts_backward``."""
    *of_layer, needed = args
    layer = Layer(*of_layer)
    if layer.ids.numel() == 0:
        return tuple(
            torch.zeros_like(each) if each is not None and need else grad.new_empty(0)
            for each, need in zip(layer.differentiable, needed, strict=True)
        )
    with on(layer.tokens), autocast_off():
        back = _Backward(layer, grad.to(columns.dtype), columns, order, ends, Needed(*needed))
        return back.gradients()


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

    def _of_down(self, made: dict[str, Tensor]) -> Tensor:
        """The gradient of ``columns``; ``made`` gets those of down, its bias and the weights."""
        layer, order, ends, needed = self.layer, self.order, self.ends, self.needed
        weights = layer.weights
        grads = rows.gather(self.grad, order, ends, layer.top_k)
        back = _multiply(grads, layer.down.transpose(1, 2), ends)
        weighted, grad_columns, products = rows.slope(
            self.columns, back, order, ends, weights, layer.body, layer.places
        )
        if needed.down:
            made["down"] = _grad_table(weighted, grads, ends, layer.down)
        if layer.down_bias is not None:
            if needed.down_bias:
                summed = rows.bias_sums(grads, order, ends, weights)
                made["down_bias"] = summed.to(layer.down_bias.dtype)
            if products is not None:
                rows.add_bias_products(grads, order, ends, layer.down_bias, products)
        if weights is not None and products is not None and needed.weights:
            made["weights"] = products.view(weights.shape).to(weights.dtype)
        return grad_columns

    def _of_inputs(self, grad_columns: Tensor) -> dict[str, Tensor]:
        layer, order, ends, needed = self.layer, self.order, self.ends, self.needed
        made: dict[str, Tensor] = {}
        halves = [grad_columns] if layer.up is None else list(grad_columns.chunk(2, -1))
        tables = [layer.gate_up] if layer.up is None else [layer.gate_up, layer.up]
        if needed.tokens:
            grad_rows = _multiply(halves[0], tables[0].transpose(1, 2), ends)
            if layer.up is not None:
                grad_rows += _multiply(halves[1], tables[1].transpose(1, 2), ends)
            row_map = sort.inverse(order, ends)
            made["tokens"] = rows.total(grad_rows, row_map, layer.top_k, layer.tokens.dtype, True)
        if needed.gate_up or needed.up:
            gathered = rows.gather(layer.tokens, order, ends, layer.top_k)
            for name, half, table in zip(("gate_up", "up"), halves, tables, strict=False):
                if getattr(needed, name):
                    made[name] = _grad_table(gathered, half, ends, table)
        biases = {"gate_up_bias": layer.gate_up_bias, "up_bias": layer.up_bias}
        for (name, bias), half in zip(biases.items(), (halves[0], halves[-1]), strict=True):
            if bias is not None and getattr(needed, name):
                made[name] = rows.bias_sums(half, order, ends).to(bias.dtype)
        return made
