"""FuseExperts: the experts of a rank as one op, where all of their tokens are there (strategies
"local" and "direct"), on devices that have kernels for that.

Contract. In: planned regions. Out: the same, those of these strategies planned as fused with what
was read of their experts (`passes/strategies/fused.py`). The report says of each what it becomes,
or why not. `Verify` tries the fused layer and takes this plan back if it is not equal.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.evaluate.extract import extract_region, structure
from moe_fx.passes.strategies.fused import Unfused, read
from moe_fx.plan import ExchangePlan, Fused
from moe_fx.region import Lowered, Region
from moe_fx.report import Report


class FuseExperts(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        if not context.device.fuses_experts:
            return PassResult(module, changed=False)
        seen: dict[str, Fused | str] = {}
        context.plans = [
            self._plan(region, plan, context, seen)
            for region, plan in zip(context.regions, context.plans, strict=True)
        ]
        return PassResult(module, changed=False)

    def _plan(
        self,
        region: Region,
        plan: ExchangePlan,
        context: Context,
        seen: dict[str, Fused | str],
    ) -> ExchangePlan:
        """seen: what was found of equal layers."""
        if plan.strategy not in ("local", "direct"):
            return plan
        alone, region_alone = extract_region(region)
        key = structure(alone)
        if key not in seen:
            try:
                seen[key] = replace(read(alone, region_alone), trains=context.training)
            except Unfused as reason:
                seen[key] = str(reason)
        found = seen[key]
        if isinstance(found, str):
            context.report.lowered.append(_kept(region, found))
            return plan
        whole = plan.strategy == "direct" and not context.training
        name = "direct_experts" if whole else "fused_experts" + "_training" * context.training
        done = Lowered(_WHAT, (f"moe_fx::{name}",), region.parts.combined.name, region.source)
        context.report.lowered.append(done)
        return replace(plan, fused=found)


_WHAT = "experts"


def unfused(region: Region, plan: ExchangePlan, report: Report, reason: str) -> ExchangePlan:
    """``plan`` without the fusion, which was not proved; ``report`` says so."""
    done = region.parts.combined.name
    report.lowered = [
        _kept(region, reason) if (each.op, each.node) == (_WHAT, done) else each
        for each in report.lowered
    ]
    return replace(plan, fused=None)


def _kept(region: Region, reason: str) -> Lowered:
    return Lowered(_WHAT, (), region.parts.combined.name, region.source, reason)
