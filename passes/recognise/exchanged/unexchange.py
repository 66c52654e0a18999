"""Unexchange: a dispatcher's exchange as the gather of weights that it is equal to.

Contract. In: a normalised graph. Out: the same graph, in which each exchange of moe_fx's dispatcher
(`moe_fx.dispatcher`) has a *stand-in* that reads its tokens, ids and weights: the program without
exchange, every rank with all experts, gathered from the ranks' shards. Recognition finds that; the
rewrite cancels the gathers and exchanges tokens again, in chunks. ``context.stand_ins`` says what
stands for what: a stand-in whose region is not accepted gives way to the captured program.

Pseudo-code, for each ``unpermute`` that ends a dispatcher's way::

    go back to the permute that began it (`dispatcher_way.py`)
    write the stand-in (`stand_in.py`)
    run both on random values (`stand_in_proof.py`): equal, or the stand-in is dropped

Rejects (declined): rows or counts read by others; an order or group not the dispatcher's own; ids
that no top-k of the graph selects; experts whose values with all tables differ.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moe_fx.graph.flow import Flow
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.normalise.id_bounds import drop_masks_of_nothing
from moe_fx.passes.recognise.exchanged.dispatcher_way import DispatcherWay
from moe_fx.passes.recognise.exchanged.stand_in import build
from moe_fx.passes.recognise.exchanged.stand_in_proof import require_equal
from moe_fx.region import Declined, source_of

ops = torch.ops.moe_fx


class Unexchange(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        proved: set[str] = set()
        for node in list(module.graph.nodes):
            if node.target is ops.gather_counts.default:
                context.exchange_groups.add(str(node.args[2]))
            if node.target is not ops.unpermute.default or not _comes_back(node):
                continue
            before = set(module.graph.nodes)
            try:
                found = DispatcherWay(Flow(module), node)
                stand_in = build(found, module)
                require_equal(found, stand_in, proved)
            except Refusal as refusal:
                for added in [n for n in reversed(module.graph.nodes) if n not in before]:
                    module.graph.erase_node(added)
                flow = Flow(module)
                select = flow.selection_above(node)
                if select is not None:
                    context.claimed |= flow.router_selections(select)
                context.report.declined.append(
                    Declined(
                        refusal.reason,
                        refusal.node.name,
                        source_of(refusal.node) or source_of(node),
                        "exchanged",
                    )
                )
            else:
                node.replace_all_uses_with(stand_in.result, propagate_meta=False)
                context.stand_ins.append(stand_in)
        if context.stand_ins:
            drop_masks_of_nothing(module.graph)  # of ids past the local experts
        return PassResult(module, changed=bool(context.stand_ins))


def _comes_back(node: Node) -> bool:
    """Whether ``node`` sums rows that a ``wait`` brought, and no other ``unpermute`` in between."""
    rows = node.args[0]
    return isinstance(rows, Node) and rows.target is ops.wait.default
