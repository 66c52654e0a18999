"""All-gathers of expert weights in a graph: ``full [E, ...] = all_gather(shard [E/W, ...])``.

That is what `moe_fx.shard_experts`, FSDP-style parametrisation and DTensor put there. Where the
ranks do not divide the experts, shards are filled up to one size, and ``full`` is the first ``E``
rows of what is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.blocks import most_experts
from moe_fx.graph.nodes import argument, same, shape
from moe_fx.region import Gather

aten = torch.ops.aten
_FUNCTIONAL = torch.ops._c10d_functional


def gather_of(node: Node) -> Gather | None:
    """The gather whose waited-for result ``node`` is, or the part of it that is no filling."""
    waited: Any = node
    if node.target is aten.slice.Tensor and argument(node, 1, "dim", 0) == 0:
        waited = node.args[0]
    if not isinstance(waited, Node) or waited.target is not _FUNCTIONAL.wait_tensor.default:
        return None
    start = waited.args[0]
    if (
        not isinstance(start, Node)
        or start.target is not _FUNCTIONAL.all_gather_into_tensor.default
    ):
        return None
    shard, world_size, group_name = start.args
    if waited is not node and not _fills_up(node, waited, world_size):
        return None
    assert isinstance(shard, Node) and isinstance(world_size, int) and isinstance(group_name, str)
    return Gather(node, shard, group_name, world_size)


def _fills_up(kept: Node, waited: Node, world_size: Any) -> bool:
    """Whether the first rows are kept, so many that no rank could have had fewer."""
    begin, step = argument(kept, 2, "start", 0), argument(kept, 4, "step", 1)
    experts, rows = shape(kept)[0], shape(waited)[0]
    if begin not in (0, None) or step != 1 or not isinstance(experts, int):
        return False
    return same(rows, world_size * most_experts(experts, world_size))


def chain(gather: Gather) -> list[Node]:
    """What makes ``full`` of ``shard``, in order."""
    nodes, node = [], gather.full
    while node is not gather.shard:
        nodes.append(node)
        node = node.all_input_nodes[0]
    return nodes[::-1]


def erase_if_unread(nodes: list[Node]) -> None:
    """A collective is never dead code to FX: take away a gather, a `chain`, that nothing reads any
    more."""
    for node in reversed(nodes):
        if node.users:
            return
        node.graph.erase_node(node)


def merge_gathers(graph: Graph, place: Callable[[Node], object]) -> None:
    """Of gathers of one shard, and one ``place``, keep the first: a table that is read twice may
    have been gathered for each."""
    kept: dict[object, Node] = {}
    for node in list(graph.nodes):
        gather = gather_of(node)
        if gather is None:
            continue
        key = (gather.shard, gather.group_name, node.target, place(node))
        first = kept.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first, propagate_meta=False)
            erase_if_unread(chain(gather))
