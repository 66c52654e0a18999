"""Captured ops on the host, whatever device they were captured for: how regions are verified.

Matmuls of rows with their experts' matrices are done by the book: strided weights and unaligned
sizes are no issue, and coarse dtypes are multiplied in float32, which a CPU does an order of
magnitude faster. ``histc`` takes integers, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moe_fx.graph.nodes import is_grouped_matmul, value

aten = torch.ops.aten

Reference = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]

_COARSE = (torch.float16, torch.bfloat16)
ROUNDED = frozenset((*_COARSE, torch.float32))
_HOST = torch.device("cpu")


def on_host(arguments: Any) -> Any:
    """The same arguments of an op, with the host for every device."""
    return map_aggregate(arguments, lambda a: _HOST if isinstance(a, torch.device) else a)


def reference_ops(module: GraphModule) -> dict[Any, Reference]:
    """Overrides for `moe_fx.passes.evaluate.simulate.run` of ``module`` or a rewrite of it."""
    targets = {node.target for node in module.graph.nodes if is_grouped_matmul(node)}
    return _REFERENCES | dict.fromkeys(targets, _grouped)


def call_on_host(node: Node, values: Mapping[Node, Any], exact: bool = False) -> Any:
    """The value of a captured node, of the values of its inputs. exact: in float64 where the model
    computes in float32 or less (`exactly`)."""

    def given(argument: Any) -> Any:
        if isinstance(argument, Node):
            return values[argument]
        if exact and isinstance(argument, torch.dtype):
            return torch.float64 if argument in ROUNDED else argument
        return _HOST if isinstance(argument, torch.device) else argument

    args: Any = map_aggregate(node.args, given)
    kwargs: Any = map_aggregate(node.kwargs, given)
    reference = _grouped if is_grouped_matmul(node) else _REFERENCES.get(node.target)
    if reference is not None:
        return reference(node, args, kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


@contextmanager
def exactly(exact: bool) -> Iterator[None]:
    """What is an equation holds in float64 to more digits than a mistake could hide in. Integers
    that become floats become float64 too."""
    before = torch.get_default_dtype()
    if exact:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def can_be_exact(nodes: Iterable[Node]) -> bool:
    """Whether no op reads the bits of floats, or makes floats of bits."""
    return not any(
        node.target is aten.view.dtype
        and ROUNDED.intersection((value(node).dtype, value(node.args[0]).dtype))
        for node in nodes
    )


def _histc(_node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values, *others = args
    if values.is_floating_point():
        return torch.histc(values, *others, **kwargs)
    return torch.histc(values.double(), *others, **kwargs).to(values.dtype)


def _grouped(node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
    rows, weight, offsets = args[:3]
    product = _grouped_matmul(rows, weight, offsets)
    if node.target is not torch.ops.moe_fx.grouped_mm.default:
        return product
    behind = product.new_zeros((len(rows) - len(product), product.shape[1]))
    return torch.cat([product, behind])


def _grouped_matmul(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``[R, D]`` rows sorted by expert times ``[E, D, N]``."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    pieces = [
        _matmul(rows[a:b], matrix)
        for a, b, matrix in zip(starts, ends, weight.unbind(), strict=True)
        if b > a
    ]
    return torch.cat([rows.new_zeros((0, weight.shape[2])), *pieces])


def _batched(_node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
    left, right = args
    if left.dtype not in _COARSE or not left.shape[0]:
        return torch.bmm(left, right)
    pairs = zip(left.unbind(), right.unbind(), strict=True)
    return torch.stack([_matmul(a, b) for a, b in pairs])


_REFERENCES: dict[Any, Reference] = {
    torch.ops.moe_fx.grouped_mm.default: _grouped,
    aten.bmm.default: _batched,
    aten.histc.default: _histc,
}


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype not in _COARSE or left.dtype != right.dtype:
        return left @ right
    product: Tensor = _CoarseMatmul.apply(left, right)
    return product


class _CoarseMatmul(torch.autograd.Function):
    """Keeps the operands for the backward as they are, not their copies in float32."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return (left.float() @ right.float()).to(left.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        grad = grads[0].float()
        need_left, need_right = ctx.needs_input_grad
        return (
            (grad @ right.float().mT).to(left.dtype) if need_left else None,
            (left.float().mT @ grad).to(right.dtype) if need_right else None,
        )
