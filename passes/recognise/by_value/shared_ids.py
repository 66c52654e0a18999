"""Ids that several rows share: ViTPose's expert per image, where an image is many rows.

``[B]`` ids beside activations ``[B, R, H]`` are the ids ``[B * R]`` of as many tokens, each R
times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import FakeValues
from moe_fx.graph.nodes import same, shape, value
from moe_fx.passes.roles import Selection

aten = torch.ops.aten

_LOOK_AHEAD = 200


@dataclass(frozen=True)
class SharedIds:
    """ids: the last of the nodes ``added`` to the graph; selection: of the rows."""

    ids: Node
    added: tuple[Node, ...]
    selection: Selection

    def undo(self) -> None:
        for node in reversed(self.added):
            node.graph.erase_node(node)


def shared_by_rows(selection: Selection, values: FakeValues) -> SharedIds | None:
    """None unless ids are given from outside, one for several rows."""
    node = selection.node
    dims = shape(node)
    if not selection.looked_up or selection.top_k != 1 or not dims:
        return None
    if not all(same(size, 1) for size in dims[1:]):
        return None
    rows = next((n for n in _from(node) if _has_rows(n, selection)), None)
    if rows is None:
        return None
    added: list[Node] = []

    def add(op: Any, *args: Any) -> Node:
        with node.graph.inserting_after(added[-1] if added else rows):
            added.append(node.graph.call_function(op, args))
        added[-1].meta = {k: v for k, v in node.meta.items() if k == "stack_trace"}
        values.compute(added[-1])
        return added[-1]

    each = shape(rows)[1]
    flat = add(aten.reshape.default, node, [-1])
    size = each if isinstance(each, int) else add(aten.sym_size.int, rows, 1)
    ids = add(aten.repeat_interleave.self_int, flat, size)
    of_rows = replace(selection, num_tokens=dims[0] * each, lead=(dims[0], each))
    return SharedIds(ids, tuple(added), of_rows)


def _from(node: Node) -> list[Node]:
    found: list[Node] = []
    while node.op != "root" and node.op != "output" and len(found) < _LOOK_AHEAD:
        found.append(node)
        node = node.next
    return found


def _has_rows(node: Node, selection: Selection) -> bool:
    val, dims = value(node), shape(node)
    return (
        isinstance(val, Tensor)
        and val.dtype.is_floating_point
        and len(dims) == 3
        and same(dims[0], selection.num_tokens)
        and not same(dims[1], 1)
    )
