"""``fused_experts`` on a GPU: sort, gate and up, down, weighted sum.

Each of the two matmuls is one of our kernels in some tiling (`kernels/gemm.py`), or torch's grouped
matmul on gathered rows, whichever `choice` says for so many tokens. They meet in ``h [S, I]``, rows
sorted by expert, so they are chosen apart.

Nothing waits for the host, and what is launched does not depend on values: all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_fx.devices.cuda.choice import GROUPED, Shape, Way, way
from moe_fx.devices.cuda.kernels import gemm, rows, sort
from moe_fx.ops.fused import split_columns

__all__ = ["Layer", "backward", "forward", "forward_training"]


@dataclass
class Layer:
    """The op's arguments, in its schema's order."""

    tokens: Tensor
    ids: Tensor
    weights: Tensor | None
    gate_up: Tensor
    up: Tensor | None
    down: Tensor
    gate_up_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: str
    act: str
    alpha: float
    limit: float | None
    shift: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.tokens.stride(-1) != 1:
            self.tokens = self.tokens.contiguous()
        if self.weights is not None:
            self.weights = self.weights.contiguous()
        if self.down_bias is not None:
            self.down_bias = self.down_bias.contiguous()

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def body(self) -> tuple[str, float, float | None, float]:
        return self.act, self.alpha, self.limit, self.shift

    @cached_property
    def places(self) -> rows.Places:
        return rows.Places.of(self.layout, self.down.shape[1])

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor | None]:
        """Gate's and up's tables ``[E, H, I]``."""
        if self.up is not None:
            return self.gate_up, self.up
        return split_columns(self.gate_up, self.layout)

    @cached_property
    def bias_halves(self) -> tuple[Tensor | None, Tensor | None]:
        if self.up is not None or self.gate_up_bias is None:
            return self.gate_up_bias, self.up_bias
        return split_columns(self.gate_up_bias, self.layout)

    @cached_property
    def shape(self) -> Shape:
        return Shape(
            experts=self.experts,
            top_k=self.top_k,
            hidden=self.tokens.shape[1],
            inner=self.down.shape[1],
            layout=self.layout,
            dtype=str(self.tokens.dtype).removeprefix("torch."),
            k_last=(self.gate_up.stride(1) == 1, self.down.stride(1) == 1),
            described=gemm.describable(*self.halves, self.down),
            grouped=_can_group(self.gate_up, self.up, self.down),
        )


def _can_group(*tables: Tensor | None) -> bool:
    """Whether torch's grouped matmul takes them on this GPU without waiting for it: bfloat16 on
    Hopper and the server Blackwells (torch 2.11 to 2.14)."""
    first = tables[0]
    assert first is not None
    if first.dtype != torch.bfloat16 or not first.is_cuda:
        return False
    if torch.cuda.get_device_capability(first.device) not in ((9, 0), (10, 0)):
        return False
    return gemm.describable(*tables)


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
        if way.gate_up != GROUPED:
            return gemm.gate_up(
                layer.tokens, self.order, self.ends, *layer.halves, *layer.bias_halves,
                layer.top_k, layer.body, way.gate_up, layer.places, columns,
            )  # fmt: skip
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
        if way.down != GROUPED:
            pairs = gemm.down(
                h, self.order, self.ends, layer.weights, layer.down, layer.down_bias, way.down
            )
            return rows.total(pairs, self.row_map, layer.top_k, layer.dtype, mapped=False)
        results = torch._grouped_mm(h, layer.down, self.ends)
        return rows.total(
            results, self.row_map, layer.top_k, layer.dtype, True, layer.weights, layer.ids,
            layer.down_bias,
        )  # fmt: skip


def forward(*args: Any) -> Tensor:
    """``moe_fx::fused_experts``."""
    layer = Layer(*args)
    if layer.ids.numel() == 0:
        return _nothing(layer)
    with _on(layer.tokens):
        run = _Run.of(layer)
        chosen = _way(layer, run)
        return run.result(chosen, run.activations(chosen))


def forward_training(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``moe_fx::fused_experts_training``."""
    layer = Layer(*args)
    pairs, width = layer.ids.numel(), layer.places.width
    columns = layer.tokens.new_empty((pairs, width * (2 if layer.places.gated else 1)))
    if pairs == 0:
        order = layer.ids.new_empty((0,), dtype=torch.int32)
        ends = layer.ids.new_zeros((layer.experts,), dtype=torch.int32)
        return _nothing(layer), columns, order, ends
    with _on(layer.tokens):
        run = _Run.of(layer)
        chosen = _way(layer, run)
        return run.result(chosen, run.activations(chosen, columns)), columns, run.order, run.ends


def _nothing(layer: Layer) -> Tensor:
    sizes = (layer.tokens.shape[0], layer.down.shape[2])
    return layer.tokens.new_zeros(sizes, dtype=layer.dtype)


@contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def _way(layer: Layer, run: _Run) -> Way:
    return way(
        layer.shape,
        layer.tokens.shape[0],
        layer.tokens.device,
        lambda each: run.activations(each),
        run.result,
    )


def _multiply(grad: Tensor, table: Tensor, ends: Tensor) -> Tensor:
    """Rows sorted by expert times ``[E, K, N]``. Rows behind are not written."""
    if _can_group(grad, table):
        return torch._grouped_mm(grad, table, ends)
    return gemm.plain(grad, table, ends)


def _grad_table(left: Tensor, right: Tensor, ends: Tensor, table: Tensor) -> Tensor:
    """``[E, K, N]``: each expert's rows of ``left [S, K]``, transposed, times those of ``right
    [S, N]``, laid out as ``table``."""
    if table.stride(1) == 1:
        return _grad_table(right, left, ends, table.transpose(1, 2)).transpose(1, 2)
    if _can_group(left, right):
        made = torch._grouped_mm(left.t(), right, ends)
    else:
        made = gemm.grad_table(left, right, ends)
    return made if made.stride() == table.stride() else torch.empty_like(table).copy_(made)


def backward(
    grad: Tensor, columns: Tensor, order: Tensor, ends: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """``moe_fx::fused_experts_backward``."""
    layer = Layer(*args)
    none = grad.new_empty(0)
    given = (
        layer.weights, layer.gate_up, layer.up, layer.down,
        layer.gate_up_bias, layer.up_bias, layer.down_bias,
    )  # fmt: skip
    if layer.ids.numel() == 0:
        zeros = (none if each is None else torch.zeros_like(each) for each in given)
        return torch.zeros_like(layer.tokens), *zeros
    with _on(layer.tokens):
        return _backward(layer, grad.to(columns.dtype), columns, order, ends, none)


def _backward(
    layer: Layer, grad: Tensor, columns: Tensor, order: Tensor, ends: Tensor, none: Tensor
) -> tuple[Tensor, ...]:
    top_k, weights = layer.top_k, layer.weights
    row_map = sort.inverse(order, ends)
    grads = rows.gather(grad, order, ends, top_k)
    back = _multiply(grads, layer.down.transpose(1, 2), ends)
    weighted, grad_columns, products = rows.slope(
        columns, back, order, ends, weights, layer.body, layer.places
    )
    del back
    grad_down = _grad_table(weighted, grads, ends, layer.down)
    biases = [none, none, none]
    if layer.down_bias is not None:
        biases[2] = rows.bias_sums(grads, order, ends, weights).to(layer.down_bias.dtype)
        if products is not None:
            rows.add_bias_products(grads, order, ends, layer.down_bias, products)
    grad_weights = none
    if weights is not None and products is not None:
        grad_weights = products.view(weights.shape).to(weights.dtype)
    gathered = rows.gather(layer.tokens, order, ends, top_k)
    halves = [grad_columns] if layer.up is None else list(grad_columns.chunk(2, -1))
    tables = [layer.gate_up] if layer.up is None else [layer.gate_up, layer.up]
    grad_rows = _multiply(halves[0], tables[0].transpose(1, 2), ends)
    if layer.up is not None:
        grad_rows += _multiply(halves[1], tables[1].transpose(1, 2), ends)
    grad_tokens = rows.total(grad_rows, row_map, top_k, layer.tokens.dtype, mapped=True)
    grad_tables = [
        _grad_table(gathered, half, ends, table) for half, table in zip(halves, tables, strict=True)
    ]
    for at, bias in enumerate((layer.gate_up_bias, layer.up_bias)):
        if bias is not None:
            biases[at] = rows.bias_sums(halves[at], order, ends).to(bias.dtype)
    return (
        grad_tokens,
        grad_weights,
        grad_tables[0],
        none if layer.up is None else grad_tables[1],
        grad_down,
        *biases,
    )
