"""NewSizes: whether a region holds sizes that only running gives, as a loop over experts does.

Contract. In: accepted regions. Out: ``context.holds_new_sizes``. The graph is not changed.

Dynamo ends a graph at an op with such a size unless it is told to go on (`moe_fx.entry.tracing`).
That pays where the op stands between a layer's router and its result.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from moe_fx.compat import new_sizes
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.region import Region


class NewSizes(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        order = list(module.graph.nodes)
        context.holds_new_sizes = any(_holds(region, order) for region in context.regions)
        return PassResult(module, changed=False)


def _holds(region: Region, order: list[Node]) -> bool:
    parts = region.parts
    inside = {parts.select, *(parts.captured or parts.nodes)}
    positions = [at for at, node in enumerate(order) if node in inside]
    between = order[min(positions) : max(positions) + 1]
    return any(new_sizes(node.meta.get("val")) for node in between)
