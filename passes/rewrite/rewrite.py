"""Rewrite: region -> dialect ops.

Contract. In: verified regions and their plans. Out: a graph in which each region's result comes
from dialect ops; the region's own nodes are gone unless something else reads them.

Pseudo-code, for one region::

    nothing travels: rows, row_map = permute(tokens, ids);  rows = experts(rows)
                     out = unpermute(rows, row_map, weights)     # or `post` as captured
                     on devices that fuse: out = fused_experts(tokens, ids, weights, tables)
    otherwise:       the same, the rows travelling as the plan's strategy says (`passes/strategies`)

All rows of a side stand in one order there, so the permutations of the captured body vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from moe_fx.graph.gathers import chain, erase_if_unread
from moe_fx.graph.nodes import value
from moe_fx.passes.base import Context, Pass, PassResult, StandIn
from moe_fx.passes.strategies import strategy_of
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.plan import ExchangePlan
from moe_fx.region import Region
from moe_fx.report.naming import layer_name

aten = torch.ops.aten


class Rewrite(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        for region, plan in zip(context.regions, context.plans, strict=True):
            if region.parts.replaces is not None:
                captured, stands_in = region.parts.replaces  # the latter may be what is rewritten
                captured.replace_all_uses_with(stands_in, propagate_meta=False)
            waiting = {
                "layer": layer_name(region.parts.ids, region.parts.combined),
                "exchange_timeout": context.options.exchange_timeout,
            }
            rewrite_region(module.graph, region, plan, waiting)
            if region.parts.replaces is not None:
                erase_checks(module.graph, region.parts.captured)
        for stand_in in context.stand_ins:
            _settle(stand_in, module.graph, context.regions)
        gathers = dict.fromkeys(g for region in context.regions for g in region.parts.gathers)
        chains = [chain(gather) for gather in gathers]
        module.graph.eliminate_dead_code()
        left = set(module.graph.nodes)
        for nodes in chains:
            erase_if_unread([node for node in nodes if node in left])
        module.graph.lint()
        module.recompile()
        return PassResult(module, changed=bool(context.regions))


def rewrite_region(
    graph: Graph, region: Region, plan: ExchangePlan, waiting: Mapping[str, Any] | None = None
) -> None:
    """Make ``region``'s users read a result computed by dialect ops, placed where the region's
    own result stood. waiting: as of `Emitter`."""
    combined = region.parts.combined
    with graph.inserting_before(combined):
        result = strategy_of(plan)(Emitter(graph, region.parts, plan, waiting))
    combined.replace_all_uses_with(result, propagate_meta=False)
    result.meta.update({k: v for k, v in combined.meta.items() if k == "val"})


def _settle(stand_in: StandIn, graph: Graph, regions: Iterable[Region]) -> None:
    """Keep what a region was made of; otherwise take the captured program back."""
    gathered = {gather.full for region in regions for gather in region.parts.gathers}
    if not gathered.isdisjoint(stand_in.gathers):
        erase_checks(graph, stand_in.replaced)
        return
    stand_in.result.replace_all_uses_with(stand_in.captured, propagate_meta=False)
    for node in reversed(stand_in.nodes):
        graph.erase_node(node)


def erase_checks(graph: Graph, gone: Iterable[Node]) -> None:
    """Assertions on the data-dependent sizes of nodes that are to go would keep those alive."""
    sized = set(gone)
    for node in list(graph.nodes):
        if any(source in sized for source in node.all_input_nodes):
            if node.target in _CHECKS:
                graph.erase_node(node)
            elif not isinstance(value(node), Tensor):
                sized.add(node)


_CHECKS = (aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)
