"""Plan: how each region's tokens reach their experts.

Contract. In: recognised regions. Out: one `ExchangePlan` per region, the same on every rank but for
the rank number. Raises `ConfigurationError` if the experts do not divide by the group.

Pseudo-code::

    group = the gather's group if the weights are gathered, else the option's
    no group, or one rank -> "local";  otherwise -> "alltoall", experts in contiguous blocks

Rejects (declined): weights gathered over another group than ``ep_group``; experts cut unevenly.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.fx import GraphModule

from moe_fx.compat import resolve_group
from moe_fx.errors import ConfigurationError
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.plan import ExchangePlan, slices
from moe_fx.region import Declined, Region


class Plan(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        kept: list[tuple[Region, ExchangePlan]] = []
        for region in context.regions:
            names = {gather.group_name for gather in region.parts.gathers}
            if context.group is not None:
                names.add(context.group.group_name)
            if len(names) > 1:
                reason = f"expert weights are gathered over more than one group: {sorted(names)}"
                context.report.declined.append(
                    Declined(reason, region.output, region.source, region.form)
                )
                continue
            group = resolve_group(names.pop()) if names else None
            kept.append((region, plan_exchange(region, group, context.options.overlap)))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)


def plan_exchange(
    region: Region, group: dist.ProcessGroup | None, overlap: str | int
) -> ExchangePlan:
    experts = region.num_experts
    if group is None or group.size() == 1:
        return ExchangePlan("local", experts, experts)
    world = group.size()
    if experts % world:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigurationError(
            f"The MoE layer at {region.source} has {experts} experts, which do not divide by the "
            f"{world} ranks of the expert-parallel group. Each rank must own the same number of "
            f"experts: use a group of {', '.join(map(str, fitting))} ranks for this model."
        )
    local = experts // world
    chunks = overlap if isinstance(overlap, int) else 1
    return ExchangePlan(
        "alltoall", experts, local, group.group_name, world, group.rank(), *slices(local, chunks)
    )
