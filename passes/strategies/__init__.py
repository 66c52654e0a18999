"""Strategies: how rows travel between tokens and experts.

In: a region and a plan. Out: nodes of the dialect, from tokens to the region's result, written with
an `emitter` by ``strategy_of(plan)``. `fitting` says which strategies a region can have.

To add a strategy: a file here with a function of an `Emitter`, a line in ``STRATEGIES``, its limits
in `fitting`, its price in `moe_fx/cost/layer.py`, and its name in `moe_fx/options.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from moe_fx.passes.strategies.alltoall import alltoall
from moe_fx.passes.strategies.direct import direct
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.passes.strategies.even import allgather, padded_alltoall
from moe_fx.passes.strategies.fused import fused
from moe_fx.passes.strategies.local import local
from moe_fx.passes.strategies.mc2 import mc2
from moe_fx.plan import ExchangePlan

__all__ = ["STRATEGIES", "strategy_of"]

STRATEGIES: dict[str, Callable[[Emitter], Node]] = {
    "local": local,
    "gather_weights": local,
    "alltoall": alltoall,
    "padded_alltoall": padded_alltoall,
    "allgather": allgather,
    "mc2": mc2,
    "direct": direct,
}


def strategy_of(plan: ExchangePlan) -> Callable[[Emitter], Node]:
    """What emits a region that is planned so."""
    whole = plan.fused is not None and plan.strategy == "local"
    return fused if whole else STRATEGIES[plan.strategy]
