"""Masks of ids that no selection gives: an index selected along a dim of size ``E`` is below ``E``.

Models that can also run with foreign experts' ids marked (``ids >= E``; transformers 5.17 in
``grouped_mm``) mask the rows of such ids, of which there are none in a model on one device. What is
masked by such a comparison is what it was.

Pseudo-code::

    bound[node] = E for the indices of topk, argmax, max and sort over a dim of size E,
                  and for what only moves ids
    ids >= n with n at least the bound -> never, and what only moves a never -> never
    masked_fill(x, never, _) -> x;   where(never, _, x) -> x, if of the same shape and dtype
    ids clamped to [0, n) with n at least the bound -> the ids
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, VIEWS, argument, is_integer, same, shape, value
from moe_fx.graph.selectors import SELECTS, SORTS, dim_of

aten = torch.ops.aten

_MOVES = (
    *VIEWS,
    *ELEMENTWISE_COPIES,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.transpose.int,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)


def drop_masks_of_nothing(graph: Graph) -> None:
    """In place."""
    bounds: dict[Node, int] = {}
    never: dict[Node, None] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        bound = _bound(node, bounds)
        if bound is not None:
            bounds[node] = bound
        elif _is_never(node, bounds, never):
            never[node] = None
        kept = _clamped(node, bounds) or _unmasked(node, never)
        if kept is not None:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    for node in reversed(never):
        if not node.users:
            graph.erase_node(node)


def _bound(node: Node, bounds: dict[Node, int]) -> int | None:
    source: Any = node.args[0] if node.args else None
    if node.target in _MOVES and source in bounds and is_integer(node):
        fits = bounds[source] - 1 <= torch.iinfo(value(node).dtype).max  # else they wrap around
        return bounds[source] if fits else None
    if node.target is aten.argmax.default and dim_of(node) is not None:
        return _size(source, dim_of(node))
    if node.target is not operator.getitem:
        return None
    of, at = node.args
    assert isinstance(of, Node)
    if of.target in SORTS and at == 0:
        return bounds.get(of.args[0])  # type: ignore[arg-type]
    if of.target in SELECTS and at == 1:
        return _size(of.args[0], dim_of(of))
    return None


def _size(scores: Any, dim: int) -> int | None:
    size = shape(scores)[dim] if isinstance(scores, Node) and shape(scores) else None
    return size if isinstance(size, int) else None


def _is_never(node: Node, bounds: dict[Node, int], never: Mapping[Node, None]) -> bool:
    source: Any = node.args[0] if node.args else None
    if node.target in (aten.ge.Scalar, aten.gt.Scalar) and source in bounds:
        limit: Any = node.args[1]
        return bounds[source] <= limit + (node.target is aten.gt.Scalar)
    return node.target in _MOVES and source in never


def _clamped(node: Node, bounds: dict[Node, int]) -> Node | None:
    """The ids, if they are clamped to where they are."""
    source: Any = node.args[0] if node.args else None
    if node.target is not aten.clamp.default or source not in bounds:
        return None
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    inside = (low is None or low <= 0) and (high is None or high >= bounds[source] - 1)
    return source if inside else None


def _unmasked(node: Node, never: Mapping[Node, None]) -> Node | None:
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        kept, mask = node.args[0], node.args[1]
    elif node.target is aten.where.self:
        mask, kept = node.args[0], node.args[2]
    else:
        return None
    if mask not in never or not isinstance(kept, Node):
        return None
    before, after = value(kept), value(node)
    if not isinstance(before, Tensor) or before.dtype != after.dtype:
        return None
    alike = len(before.shape) == len(after.shape) and all(map(same, before.shape, after.shape))
    return kept if alike else None
