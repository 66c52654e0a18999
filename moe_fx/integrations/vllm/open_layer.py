"""Open one layer: its op becomes route, permute, exchange, experts, unpermute and shared expert.

Contract. In: a graph, a `Site` in it whose layer fits the `Layout`, and the plan. Out: the graph
computes what the op's results are; the op has gone. A routed result is a rank's part of what vLLM
sums over tensor-parallel ranks next, as the op's was.

Pseudo-code, "replicated" (each rank of the group has all these tokens)::

    rows, row_map, counts = permute_local(tokens, ids)       # rows of own experts
    routed = unpermute(experts(rows, counts), row_map, weights)

"alltoall", where ``W`` ranks have the same tokens::

    own = own_tokens(tokens, W);  weights, ids = route(own)
    rows travel to their experts and back (moe_fx.passes.strategies.alltoall)
    routed = place_tokens(result, W)                         # among zeros
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.compat import FakeValues
from moe_fx.integrations.vllm.layout import Layout
from moe_fx.integrations.vllm.sites import Site
from moe_fx.passes.strategies import STRATEGIES
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.plan import ExchangePlan
from moe_fx.region import Parts

ops = torch.ops.moe_fx
own_ops = torch.ops.moe_fx_vllm
aten = torch.ops.aten

REPLICATED = "replicated"


def open_layer(graph: Graph, site: Site, layout: Layout, plan: ExchangePlan) -> None:
    with graph.inserting_before(site.node):
        results = _Opened(graph, site, layout, plan).results()
    for node, name in site.results.items():
        node.replace_all_uses_with(results[name], propagate_meta=False)
        if node is not site.node:
            graph.erase_node(node)
    graph.erase_node(site.node)


@dataclass
class _Opened:
    graph: Graph
    site: Site
    layout: Layout
    plan: ExchangePlan

    def __post_init__(self) -> None:
        self.values = FakeValues(self.graph)
        self.given = self.site.arguments
        layout = self.layout
        self.sharing, self.part = 1, 0
        if self.plan.strategy != REPLICATED:
            if layout.different_tokens and self.site.opaque:
                self.sharing, self.part = layout.tensor_parallel, layout.tensor_rank
            else:
                self.sharing, self.part = layout.world_size, layout.rank

    def results(self) -> dict[str, Node]:
        tokens = self.site.tokens
        own, weights, ids = self._routed_tokens()
        emitter = _Emitter(self.graph, self._parts(own, weights, ids), self.plan, self._experts)
        if self.plan.strategy == REPLICATED:
            routed = _replicated(emitter, self.layout)
        else:
            routed = STRATEGIES[self.plan.strategy](emitter)
        if self.sharing > 1:
            place = own_ops.place_tokens.default
            routed = emitter.call(place, routed, tokens, self.sharing, self.part)
        elif (dtype := tokens.meta["val"].dtype) != torch.float32:  # that of routing weights
            routed = emitter.call(aten._to_copy.default, routed, dtype=dtype)
        if not self.site.opaque:
            return {"output": routed}
        name = self.given["layer_name"]
        if self.layout.may_be_reduced:
            routed = emitter.call(own_ops.reduced.default, routed, name)
        results = {"routed": routed}
        if "shared" in self.site.results.values():
            source = self.given["shared_experts_input"]
            results["shared"] = self.call(
                own_ops.shared.default, tokens if source is None else source, name
            )
        return results | {"hidden_states": tokens}

    def _routed_tokens(self) -> tuple[Node, Node, Node]:
        """The tokens that this rank routes, their weights and ids."""
        given = self.given
        if not self.site.opaque:
            parts = [self._part(given[name]) for name in ("input", "topk_weights", "topk_id")]
            return parts[0], parts[1], parts[2]
        own = self._part(self.site.tokens)
        logits = self._part(given["router_logits"])
        input_ids = given["input_ids"]
        input_ids = None if input_ids is None else self._part(input_ids)
        routed = self.call(
            own_ops.route.default, own, logits, input_ids, given["layer_name"], self.layout.top_k
        )
        return own, self.item(routed, 0), self.item(routed, 1)

    def _part(self, node: Node) -> Node:
        if self.sharing == 1:
            return node
        return self.call(own_ops.own_tokens.default, node, self.sharing, self.part)

    def _experts(self, call: Callable[..., Node], rows: Node, counts: Node, first: int) -> Node:
        given = self.given
        if self.site.opaque:
            return call(own_ops.experts.default, rows, counts, first, given["layer_name"])
        names = ("w13", "w2", "w13_bias", "w2_bias", "act", "isa")
        weights = [given[name] for name in names]
        return call(own_ops.cpu_experts.default, rows, counts, first, *weights)

    def _parts(self, tokens: Node, weights: Node, ids: Node) -> Parts:
        """The layer as a region: its rows unweighted, or tokens weighed before the experts."""
        weighs_tokens = not self.site.opaque and bool(self.given["skip_weighted"])
        sizes = [self.call(aten.sym_size.int, tokens, 0), self.layout.hidden]
        permuted = self.call(ops.permute.default, tokens, ids)
        rows, row_map = self.item(permuted, 0), self.item(permuted, 1)
        factor = None if weighs_tokens else weights
        combined = self.call(ops.unpermute.default, rows, row_map, factor, sizes)
        return Parts(
            select=ids,
            tokens=tokens,
            ids=ids,
            weights=factor,
            nodes=(),
            dispatched=(rows,),
            body=(),
            cut=rows,
            post=(),
            combined=combined,
            tables=(),
            gathers=(),
            roles={},
            distinct=False,  # a router may be any function
        )

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A node with its value, or the number that it is."""
        node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.site.node.meta.get("stack_trace", "")
        value = self.values.compute(node)
        if isinstance(value, int):
            self.graph.erase_node(node)
            return value
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)  # type: ignore[no-any-return]


class _Emitter(Emitter):
    """Whose experts are vLLM's."""

    def __init__(
        self,
        graph: Graph,
        parts: Parts,
        plan: ExchangePlan,
        emit: Callable[[Callable[..., Node], Node, Node, int], Node],
    ) -> None:
        super().__init__(graph, parts, plan)
        self._emit = emit

    def experts(self, rows: Node, counts: Node, at: int = 0, fill: float | None = None) -> Node:
        return self._emit(self.call, rows, counts, at * self.plan.experts_per_slice)


def _replicated(emitter: Emitter, layout: Layout) -> Node:
    parts, call, item = emitter.parts, emitter.call, emitter.item
    first = layout.rank * layout.local_experts
    where = (first, layout.local_experts, 1, layout.top_k, None, False)
    permuted = call(ops.permute_local.default, parts.tokens, parts.ids, *where)
    rows, row_map, counts = (item(permuted, at) for at in range(3))
    result = emitter.experts(rows, counts)
    sizes = [call(aten.sym_size.int, parts.tokens, 0), layout.hidden]
    return call(ops.unpermute.default, result, row_map, parts.weights, sizes, True)
