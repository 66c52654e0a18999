"""All-gathers of expert weights in a graph: ``full [E, ...] = all_gather(shard [E/W, ...])``.

That is what `moe_fx.shard_experts`, FSDP-style parametrisation and DTensor put there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from moe_fx.region import Gather

_FUNCTIONAL = torch.ops._c10d_functional


def gather_of(node: Node) -> Gather | None:
    """The gather whose waited-for result ``node`` is."""
    if node.target is not _FUNCTIONAL.wait_tensor.default:
        return None
    start = node.args[0]
    if (
        not isinstance(start, Node)
        or start.target is not _FUNCTIONAL.all_gather_into_tensor.default
    ):
        return None
    shard, world_size, group_name = start.args
    assert isinstance(shard, Node) and isinstance(world_size, int) and isinstance(group_name, str)
    return Gather(node, shard, group_name, world_size)


def erase_if_unread(gather: Gather) -> None:
    """A collective is never dead code to FX: take away a gather that nothing reads any more."""
    if not gather.full.users:
        start = gather.full.args[0]
        assert isinstance(start, Node)
        for node in (gather.full, start):
            if not node.users:
                node.graph.erase_node(node)


def merge_gathers(graph: Graph, place: Callable[[Node], object]) -> None:
    """Of gathers of one shard, and one ``place``, keep the first: a table that is read twice may
    have been gathered for each."""
    kept: dict[object, Node] = {}
    for node in list(graph.nodes):
        gather = gather_of(node)
        if gather is None:
            continue
        first = kept.setdefault((gather.shard, gather.group_name, place(node)), node)
        if first is not node:
            node.replace_all_uses_with(first, propagate_meta=False)
            erase_if_unread(gather)
