"""moe_fx's costs for Inductor's own overlap scheduler, which prices sizes that only the run knows
by their largest possible value, and grouped matrix products not at all (torch 2.13)."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.fx import Graph, Node

from moe_fx.cost.link import calibrate
from moe_fx.passes.overlap.node_costs import MATMULS, GraphCosts

__all__ = ["inductor_runtime_estimation"]

_EXCHANGES = (
    torch.ops.moe_fx.all_to_all.default,
    torch.ops._c10d_functional.all_to_all_single.default,
)


def inductor_runtime_estimation(
    group: dist.ProcessGroup, device: torch.device | str
) -> Callable[[Node, int | None], float | None]:
    """A callback for ``custom_runtime_estimation``: milliseconds of an exchange or of a matrix
    product; None (Inductor's own estimate) for any other node.

    ::

        torch._inductor.config.aten_distributed_optimizations.custom_runtime_estimation = (
            moe_fx.inductor_runtime_estimation(dist.group.WORLD, "cuda")
        )

    A collective: measures the group's link for ``device``, unless it has been. Rows that only the
    run can tell count as the mean over the ranks.
    """
    calibrate(group, torch.device(device))
    costs: WeakKeyDictionary[Graph, GraphCosts] = WeakKeyDictionary()

    def estimate(node: Node, override_size: int | None = None) -> float | None:
        if node.graph not in costs:
            costs[node.graph] = GraphCosts(node.graph)
        if node.target in _EXCHANGES:
            return 1e3 * costs[node.graph].exchange(node)
        if node.target in MATMULS:
            return 1e3 * costs[node.graph].compute(node)
        return None

    return estimate
