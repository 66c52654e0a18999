"""Matmuls of rows with their experts' matrices, by the book: what verification calls in place of
the ops. Strided weights and unaligned sizes are no issue, and coarse dtypes are multiplied in
float32, which a CPU does an order of magnitude faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.passes.roles import is_grouped_matmul

_COARSE = (torch.float16, torch.bfloat16)


def reference_matmuls(module: GraphModule) -> dict[Any, Any]:
    """Overrides for `moe_fx.simulate.run` of ``module`` or a rewrite of it."""
    targets = {node.target for node in module.graph.nodes if is_grouped_matmul(node)}
    targets.add(torch.ops.moe_fx.grouped_mm.default)
    return {torch.ops.aten.bmm.default: _batched} | dict.fromkeys(targets, _grouped)


def _grouped(_node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
    rows, *others = args[:3]
    product = grouped_matmul(rows, *others)
    behind = product.new_zeros((len(rows) - len(product), product.shape[1]))
    return torch.cat([product, behind])


def grouped_matmul(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
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
