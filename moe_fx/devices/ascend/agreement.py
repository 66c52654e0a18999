"""Checks that ranks have planned the same, where a lowering takes away the op that had them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

ops = torch.ops.moe_fx


def agree(
    graph: Graph,
    before: Node,
    tensors: list[Node],
    group: Any,
    plans: str | None = None,
    timeout: float = 0.0,
) -> None:
    """Check there that the ranks have planned the same, if that was to be checked."""
    if plans is not None:
        with graph.inserting_before(before):
            graph.call_function(ops.agree.default, (tensors, group, plans, timeout))
