"""PlanForRanks: in place of `Plan`, what each region would be on so many ranks, without them.

Contract. In: recognised regions. Out: one `ExchangePlan` per region, for a group that does not
exist: the rewritten graph can be read, verified and simulated, not run.

Rejects (declined): weights gathered from another number of ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moe_fx.blocks import most_experts
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.plan.planner import asked, planned
from moe_fx.passes.strategies.fitting import Misfit, fitting_strategies
from moe_fx.plan import ExchangePlan
from moe_fx.region import Declined, Region

GROUP_NAME = "simulated"


class PlanForRanks(Pass):
    def __init__(self, world_size: int, rank: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, got {rank} and {world_size}")
        self.world_size, self.rank = world_size, rank

    @property
    def name(self) -> str:
        return "plan"

    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        kept: list[tuple[Region, ExchangePlan]] = []
        for region in context.regions:
            try:
                plan = self.plan(region, context)
            except Misfit as misfit:
                context.report.declined.append(
                    Declined(str(misfit), region.output, region.source, region.form)
                )
                continue
            alone = region.program == "local" and self.world_size > 1
            program = "replicated" if alone else region.program
            kept.append((replace(region, program=program), plan))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)

    def plan(self, region: Region, context: Context) -> ExchangePlan:
        num_experts, world = region.num_experts, self.world_size
        others = {gather.world_size for gather in region.parts.gathers} - {world}
        if others:
            raise Misfit(f"expert weights are gathered from {others.pop()} ranks, not {world}")
        if world == 1:
            return ExchangePlan("local", num_experts, num_experts)
        strategy = fitting_strategies(region, context, world)[0]
        choice = asked(strategy, most_experts(num_experts, world), context)
        return planned(region, choice, context.options, (GROUP_NAME, world, self.rank))
