"""Plan: how each region's tokens reach their experts.

Contract. In: recognised regions. Out: an `ExchangePlan` per region, the same on every rank.
`PlanForRanks` plans for ranks that are not there, `FuseExperts` lets a
device's kernels do local layers. Rejects (declined): what no strategy fits.
"""

from __future__ import annotations

from moe_fx.passes.plan.fuse_experts import FuseExperts
from moe_fx.passes.plan.plan_for_ranks import PlanForRanks
from moe_fx.passes.plan.planner import Plan

__all__ = ["FuseExperts", "Plan", "PlanForRanks"]
