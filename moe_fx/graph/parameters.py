"""Which inputs of a graph are parameters, and so cannot hold tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import same, shape, value


def is_noted(node: Node) -> bool:
    """The capture saw that ``node`` is a parameter or buffer of the model. (A parameter that is
    given as an argument, or a graph of another compiler, comes without the note.)"""
    return bool(node.meta.get("parameter"))


def is_for_experts(node: Node, experts: int, lead: Sequence[Any]) -> bool:
    """Whether ``node`` has an entry for each expert, and not for each token. lead: the dims that
    count tokens."""
    dims = shape(node)
    if len(dims) < 2 or not same(dims[0], experts):
        return False
    total: Any = 1
    for size in lead:
        total = total * size
    counts = same(dims[0], total) or all(map(same, dims, lead))
    return not counts


def is_tensor(node: Node) -> bool:
    """A tensor, and no number of the model's that is passed as one."""
    return isinstance(value(node), Tensor) and "scalar" not in node.meta
