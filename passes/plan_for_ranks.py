"""PlanForRanks: in place of `Plan`, what each region would be on so many ranks, without them.

Contract. In: recognised regions. Out: one `ExchangePlan` per region, for a group that does not
exist: the rewritten graph can be read, verified and simulated, not run.

Rejects (declined): experts that do not divide by the ranks; weights gathered from another number of
ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.planner import asked
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
            reason = self._misfit(region)
            if reason:
                context.report.declined.append(
                    Declined(reason, region.output, region.source, region.form)
                )
            else:
                alone = region.program == "local" and self.world_size > 1
                program = "replicated" if alone else region.program
                kept.append((replace(region, program=program), self.plan(region, context)))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)

    def _misfit(self, region: Region) -> str:
        if region.num_experts % self.world_size:
            return f"{region.num_experts} experts do not divide by {self.world_size} ranks"
        others = {gather.world_size for gather in region.parts.gathers} - {self.world_size}
        if others:
            return f"expert weights are gathered from {others.pop()} ranks, not {self.world_size}"
        return ""

    def plan(self, region: Region, context: Context) -> ExchangePlan:
        num_experts, overlap = region.num_experts, context.options.overlap
        if self.world_size == 1:
            return ExchangePlan("local", num_experts, num_experts)
        local = num_experts // self.world_size
        place = (GROUP_NAME, self.world_size, self.rank)
        return ExchangePlan("alltoall", num_experts, local, *place, *asked(local, overlap))
