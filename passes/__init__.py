"""The way of a graph: every pass of moe_fx, in order.

``torch.compile`` hands a graph to `moe_fx.entry.backend`, which traces it to functional ATen
(`moe_fx.capture`), runs this pipeline and gives the result to the base compiler (`moe_fx.bases`) or
to a device that lowers it (`moe_fx.devices`). A stage is a folder, whose first lines say what goes
in and out, what it rejects, and where to add what::

    normalise    one spelling for each operation
    recognise    which nodes are an MoE layer, and what each of them means
    plan         how tokens reach their experts: a strategy, in so many chunks
    verify       the rewrite, run beside what was captured; what is not proved equal is declined
    rewrite      regions -> dialect ops, as the plan's strategy (`strategies`) emits them
    overlap      exchanges start early and are waited for late
    lower        dialect ops -> the device's, in the graphs that the base compiler runs
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.legal import check_order, check_pairs, collectives, in_tests
from moe_fx.passes.normalise import Normalise
from moe_fx.passes.overlap import Overlap
from moe_fx.passes.plan import FuseExperts, Plan, PlanForRanks
from moe_fx.passes.recognise import Recognise
from moe_fx.passes.recognise.exchanged import Exchanged, Unexchange
from moe_fx.passes.rewrite import FuseRouter, Rewrite
from moe_fx.passes.verify import Describe, NewSizes, Verify
from moe_fx.report.naming import module_of

ANALYSIS: tuple[Pass, ...] = (
    Normalise(),
    Exchanged(),
    Unexchange(),
    Recognise(),
    Plan(),
    FuseExperts(),
    Verify(),
    NewSizes(),
    Describe(),
)
TRANSFORMATION: tuple[Pass, ...] = (FuseRouter(), Rewrite(), Overlap())
PIPELINE: tuple[Pass, ...] = ANALYSIS + TRANSFORMATION

__all__ = [
    "ANALYSIS",
    "PIPELINE",
    "TRANSFORMATION",
    "Context",
    "Pass",
    "PassResult",
    "for_ranks",
    "pipeline",
    "run",
]


def pipeline(ordered_later: bool) -> tuple[Pass, ...]:
    """ordered_later: the compiler that gets the result calls `overlap` on what it makes of it."""
    return ANALYSIS + TRANSFORMATION[: -1 if ordered_later else None]


def for_ranks(
    world_size: int, rank: int = 0, passes: tuple[Pass, ...] = PIPELINE
) -> tuple[Pass, ...]:
    """``passes``, planning for so many ranks without a process group."""
    return tuple(
        PlanForRanks(world_size, rank) if isinstance(step, (Plan, PlanForRanks)) else step
        for step in passes
    )


def run(module: GraphModule, context: Context, passes: tuple[Pass, ...] = PIPELINE) -> GraphModule:
    """The rewritten graph, or ``module`` itself if no region was accepted."""
    current = module
    checked = context.options.strict or in_tests()
    for step in passes:
        before = collectives(current.graph) if checked else []
        current = step(current, context).module
        if checked and isinstance(step, (Rewrite, Overlap)):
            check_pairs(current.graph)
        if checked and isinstance(step, Overlap):
            check_order(before, current.graph)
    context.report.regions += context.regions
    context.report.plans += context.plans
    context.report.graphs += 1
    made_in = {node.name: module_of(node) for node in module.graph.nodes}
    context.report.declined = [
        replace(each, module=each.module or made_in.get(each.node, ""))
        for each in context.report.declined
    ]
    return current if context.regions else module
