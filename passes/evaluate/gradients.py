"""Gradients of a region and of its replacement, on simulated ranks.

The loss is the sum over ranks of ``(output * cotangent).sum()``, with a random cotangent per rank.
A tensor that several ranks hold in common is one leaf: its gradient is the sum over ranks,
whichever rank each part came from. Tensors of one rank, shards among them, have a gradient each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from moe_fx.graph.copy import copy_graph
from moe_fx.graph.nodes import value
from moe_fx.passes.evaluate.extract import Extract
from moe_fx.region import Region

aten = torch.ops.aten

_BUDGET_BYTES = 1 << 26
"""Of dense gradients, on all ranks together. What exceeds it gets none."""

Run = Callable[[Sequence[Sequence[Any]]], list[Any]]
"""Inputs by rank -> outputs by rank, each a sequence of one tensor."""


class NotDifferentiable(Exception):
    """Autograd refused; says how."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that gets a gradient: input ``position`` of ``rank``, or of every rank (None)."""

    tensor: Tensor
    position: int
    rank: int | None


def choose_leaves(inputs: Sequence[Sequence[Any]]) -> list[Leaf]:
    """The floating inputs, the smallest first, as far as the budget goes."""
    found: dict[int, Leaf] = {}
    for rank, values in enumerate(inputs):
        for position, tensor in enumerate(values):
            if _is_floating(tensor):
                common = id(tensor) in found
                found[id(tensor)] = Leaf(tensor, position, None if common else rank)
    leaves: list[Leaf] = []
    left = _BUDGET_BYTES
    for leaf in sorted(found.values(), key=lambda leaf: leaf.tensor.numel()):
        copies = len(inputs) if leaf.rank is None else 1
        left -= copies * leaf.tensor.numel() * leaf.tensor.element_size()
        if left < 0:
            break
        leaves.append(leaf)
    return sorted(leaves, key=lambda leaf: leaf.position)


def run_with_gradients(
    run: Run, inputs: Sequence[Sequence[Any]], leaves: Sequence[Leaf], seed: int
) -> tuple[list[Any], list[Tensor]]:
    """(outputs by rank, a gradient per leaf: zero where none flows). The same ``seed`` gives the
    same cotangents. Raises `NotDifferentiable`, and what ``run`` raises."""
    with torch.enable_grad():
        fresh = {id(leaf.tensor): leaf.tensor.detach().requires_grad_() for leaf in leaves}
        outputs = run([[fresh.get(id(v), v) for v in values] for values in inputs])
        pairs = [
            (out, _cotangent(out, seed + rank))
            for rank, (out,) in enumerate(outputs)
            if out.requires_grad
        ]
        found: Sequence[Tensor | None] = [None] * len(fresh)
        if pairs:
            roots, cotangents = zip(*pairs, strict=True)
            try:
                found = torch.autograd.grad(
                    roots, list(fresh.values()), cotangents, allow_unused=True
                )
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise NotDifferentiable(f"{type(error).__name__}: {error}") from error
    gradients = [
        torch.zeros_like(leaf.tensor) if gradient is None else gradient
        for leaf, gradient in zip(leaves, found, strict=True)
    ]
    return [(out.detach(),) for (out,) in outputs], gradients


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cotangent(out: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=generator).to(out.dtype)


def gradient_cuts(alone: Extract, region: Region) -> frozenset[str] | None:
    """Names of the extracted nodes that the model computes under ``torch.no_grad``: an extracted
    graph has lost the switches around its nodes. None if the result is one of them, as then it and
    whatever takes its place have no gradient. region: that of the extracted nodes."""
    enabled, names = True, set()
    for original in next(iter(alone.copies)).graph.nodes:
        if original.target is torch._C._set_grad_enabled:
            enabled = bool(original.args[0])
        elif not enabled and original in alone.copies:
            copy = alone.copies[original]
            if copy.op == "call_function" and _is_floating(value(copy)):
                names.add(copy.name)
    return None if region.parts.combined.name in names else frozenset(names)


def cut_at(module: GraphModule, names: frozenset[str]) -> GraphModule:
    """``module``, or a copy through whose nodes of these names no gradient flows."""
    if not names:
        return module
    copy = copy_graph(module)
    for node in [node for node in copy.graph.nodes if node.name in names]:
        with copy.graph.inserting_after(node):
            cut = copy.graph.call_function(aten.detach.default)
        node.replace_all_uses_with(cut)
        cut.args = (node,)
    return copy
