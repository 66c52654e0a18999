"""Recognise: from each selection, walk the dataflow until it has rejoined a value of the tokens.

Contract. In: a normalised graph. Out: the same graph, ``context.regions`` and the report's declined
candidates. A region is returned only if every node on the way has a proven role (`rules.py`).

Pseudo-code::

    for each anchor (`anchors.py`): the ops that select a router's experts
        give roles to their users, in graph order, as long as a rule applies
        exactly one Combined -> the nodes it needs; check tokens, ids, cut, escapes -> Region
        otherwise            -> Declined with the refusal that got furthest
    anchors inside a region's router are part of that region

Rejects: selections whose indices never dispatch rows; rows that mix; two results; expert rows read
from outside; weights that enter before an expert matmul; tokens from two places.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.graph.flow import closure
from moe_fx.graph.lineage import trace
from moe_fx.graph.names import activation_name, has_shared_expert
from moe_fx.graph.nodes import is_grouped_matmul, is_integer, shape, tensor_inputs, value
from moe_fx.graph.refusal import Refusal
from moe_fx.graph.selectors import may_select_experts
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.recognise.anchors import Anchor, find_anchors
from moe_fx.passes.recognise.by_rule.rules import Roles
from moe_fx.passes.recognise.by_value.by_value import Readings
from moe_fx.passes.recognise.by_value.canonical import canonical
from moe_fx.passes.recognise.expert_choice import REASON, experts_choose
from moe_fx.passes.recognise.router.router import RouterCache, recognise_router
from moe_fx.passes.recognise.selection import holds_selected, select
from moe_fx.passes.recognise.tables import check_tables
from moe_fx.passes.roles import (
    Combined,
    Grouped,
    PairIds,
    PairWeights,
    PerToken,
    Role,
    Rows,
    RowTable,
    Selection,
)
from moe_fx.region import Declined, Parts, Region, Router, source_of

aten = torch.ops.aten


class Recognise(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        routers: RouterCache = {}
        refusals: list[tuple[Anchor, Refusal]] = []
        anchors = find_anchors(module.graph)
        readings = Readings(module.graph, context.training, anchors)
        for anchor in anchors:
            if anchor.node in context.claimed:
                continue
            try:
                context.regions.append(recognise(anchor, context, routers))
            except Refusal as by_rules:
                try:
                    region = recognise_by_value(anchor, context, routers, readings)
                    context.regions.append(region)
                except Refusal as by_value:
                    if anchor.certain or by_value.progress >= _ROWS_MET_TABLES:
                        refusals.append((anchor, _nearer(by_rules, by_value)))
        inside = _routers(context.regions)
        for anchor, reason in refusals:
            if anchor.node not in inside:
                context.report.declined.append(declined(anchor.node, reason))
        for name, submodule in module.named_children():
            if isinstance(submodule, GraphModule) and may_select_experts(submodule, certain=True):
                context.report.declined.append(
                    Declined("the selection is inside a higher-order op", name, "")
                )
        return PassResult(module, changed=False)


_ROWS_MET_TABLES = 3


def _nearer(by_rules: Refusal, by_value: Refusal) -> Refusal:
    """The rules name the op at fault, if they know it."""
    if by_rules.unknown and by_value.progress >= _ROWS_MET_TABLES:
        return by_value
    by_rules.no_experts = by_rules.unknown and by_value.no_experts
    return by_rules


def declined(node: Node, refusal: Refusal) -> Declined:
    forms = ("", "", "grouped_mm", "batched_mm", "grouped_mm", "grouped_mm", "dense")
    reason = refusal.reason
    chosen = refusal.no_experts and experts_choose(node)
    if chosen:
        reason = REASON
    if node.op == "placeholder":
        outside = f"the expert ids come from outside of this graph ({node.name})"
        reason = outside if refusal.unknown else f"{outside}, and {reason}"
    return Declined(
        reason=reason,
        node=refusal.node.name,
        source=source_of(refusal.node) or source_of(node),
        nearest_form=forms[refusal.progress],
        reads_experts=chosen or node.op == "placeholder" or not refusal.no_experts,
    )


def recognise(anchor: Anchor, context: Context, routers: RouterCache) -> Region:
    selection = select(anchor)
    roles, combined, refusals = _walk(selection)
    if not combined:
        raise _furthest(refusals, selection, roles.of)
    if len(combined) > 1:
        raise Refusal("the experts' rows are summed in more than one place", combined[1], 5)
    parts = _parts(selection, roles, combined[0])
    if not holds_selected(parts.ids, selection):
        selection = replace(selection, exact=False)
        parts = replace(parts, distinct=selection.top_k == 1)
    router, gate = recognise_router(selection, parts, routers)
    parts = replace(parts, gate=gate)
    return Region(
        num_experts=selection.num_experts,
        top_k=selection.top_k,
        hidden_size=int(shape(parts.tokens)[-1]),
        router=router,
        form="grouped_mm" if any(map(is_grouped_matmul, parts.body)) else "batched_mm",
        program=_program(parts, context),
        activation=activation_name(parts.body),
        has_shared_expert=has_shared_expert(parts.combined, parts.tokens),
        source=source_of(anchor.node) or source_of(parts.combined),
        input=parts.tokens.name,
        output=parts.combined.name,
        verified=False,
        parts=parts,
    )


def recognise_by_value(
    anchor: Anchor, context: Context, routers: RouterCache, readings: Readings
) -> Region:
    """Where the way of the rows is not one the rules know: from what it does to values."""
    reading = readings.read(anchor)
    parts = canonical(reading, readings.values)
    try:
        router, gate = recognise_router(reading.selection, parts, routers)
        parts = replace(parts, gate=gate)
    except Refusal as refusal:  # of ids that are no selected indices: they were proved by value
        router = Router(note=refusal.reason)
    return Region(
        num_experts=reading.selection.num_experts,
        top_k=reading.selection.top_k,
        hidden_size=int(shape(parts.tokens)[-1]),
        router=router,
        form=reading.form,
        program=_program(parts, context),
        activation=activation_name(parts.body),
        has_shared_expert=has_shared_expert(reading.result, reading.tokens, reading.base),
        source=source_of(anchor.node) or source_of(parts.combined),
        input=reading.tokens.name,
        output=reading.result.name,
        verified=False,
        parts=parts,
        effects=reading.effects,
    )


def _program(parts: Parts, context: Context) -> str:
    if parts.gathers:
        put_there = {full for stand_in in context.stand_ins for full in stand_in.gathers}
        return "exchanged" if {g.full for g in parts.gathers} <= put_there else "gathered"
    return "replicated" if context.group else "local"


def _walk(selection: Selection) -> tuple[Roles, list[Node], list[Refusal]]:
    roles = Roles(selection)
    combined: list[Node] = []
    refusals: list[Refusal] = []
    seen = {user for node in selection.selectors for user in node.users}
    queue = list(seen)
    heapq.heapify(queue)  # nodes compare by their place in the graph
    while queue:
        node = heapq.heappop(queue)
        if node in roles.of:
            continue
        try:
            role = roles.infer(node)
        except Refusal as refusal:
            refusals.append(refusal)
            continue
        roles.of[node] = role
        if isinstance(role, Combined):
            combined.append(node)
            continue
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(queue, user)
    return roles, combined, refusals


def _furthest(refusals: list[Refusal], selection: Selection, of: dict[Node, Role]) -> Refusal:
    if not refusals:
        return Refusal("nothing reads the selected indices", selection.node)
    best = max(refusals, key=lambda refusal: refusal.progress)
    if best.progress == 0:
        left = _leaving(selection.node.graph.output_node(), selection, of)
        if left:
            return Refusal(left, selection.node, unknown=True)
        return Refusal(
            f"the selected indices never bring tokens to experts ({best.reason})",
            best.node,
            unknown=True,
        )
    return best


LEAVES = "leave the graph"
"""In the reason of a refusal: the rest of the layer, if it is one, is not in this graph."""
AT_BREAK = "graph break at"
"""In the reason of a refusal: there the graph ends, within the layer."""


def _leaving(output: Node, selection: Selection, of: dict[Node, Role]) -> str:
    """What of the layer is given to the graph's caller, and why; "" if nothing is."""
    given = output.all_input_nodes
    if any(isinstance(of.get(node), (Rows, RowTable, Grouped)) for node in given):
        left = f"rows on their way to experts and back {LEAVES}"
    elif any(is_integer(node) and _is_selected(node, selection) for node in given):
        left = f"the selected indices never bring tokens to experts here: they {LEAVES}"
    else:
        return ""
    where = output.meta.get("graph_break")
    if where is None:
        return f"{left}, for what is not compiled with it"
    return f"{left}, for what is behind the {AT_BREAK} {where}"


def _is_selected(node: Node, selection: Selection) -> bool:
    """Whether ``node`` is made of selected indices, by ops on integers."""

    def integers(node: Node) -> list[Node]:
        above = [] if node in selection.selectors else tensor_inputs(node)
        return [n for n in above if is_integer(n) or not isinstance(value(n), Tensor)]

    selected = [n for n in selection.selectors if n.op == "call_function"]
    return not closure([node], integers).isdisjoint(selected)


def _parts(selection: Selection, roles: Roles, combined: Node) -> Parts:
    nodes = sorted(_ancestors(combined, roles.of))
    of = roles.of
    body = [n for n in nodes if _stage(of[n]) in ("token", "expert")]
    post = [n for n in nodes if _stage(of[n]) == "post"]
    cut = _the_only(
        [n for n in body if any(u in post for u in n.users)],
        "result of the experts that is weighted",
        combined,
    )
    if not isinstance(of[cut], Rows) or _stage(of[cut]) != "expert":
        raise Refusal("the weighted rows are not the experts' result", cut, 5)
    ids = _the_only(
        {of[n].source for n in nodes if isinstance(of[n], PairIds)},  # type: ignore[attr-defined]
        "matrix of expert ids that dispatches rows",
        combined,
    )
    dispatched = [n for n in nodes if n in roles.dispatched]
    tokens = _the_only(
        {roles.dispatched[n] for n in dispatched}, "dispatched token tensor", combined
    )
    weights = _weights(nodes, of)
    needed = set(nodes)
    tables = [t for t in roles.tables if any(u in needed for u in t.users)]
    _check_escapes(body, needed, of)
    check_tables(tables, tokens, body, of, selection.num_experts)
    weight = _the_only(weights, "matrix of routing weights", combined) if weights else None
    others = {s for n in nodes for s in tensor_inputs(n)} - {*nodes, *tables, tokens, ids, weight}
    whole = [n for n in others if n not in of]
    lineage = trace(tables, selection.num_experts, sorted(whole))
    return Parts(
        select=selection.node,
        tokens=tokens,
        ids=ids,
        weights=weight,
        nodes=tuple(nodes),
        body=tuple(body),
        cut=cut,
        post=tuple(post),
        combined=combined,
        dispatched=tuple(dispatched),
        tables=tuple(tables),
        gathers=tuple(lineage.gathers.values()),
        roles=dict(of),
        distinct=selection.distinct,
    )


def _weights(nodes: Iterable[Node], of: dict[Node, Role]) -> set[Node]:
    """The router's ``[T, K]`` weights, flattened to pairs or met by rows grouped by token."""
    flattened = {of[n].source for n in nodes if isinstance(of[n], PairWeights)}  # type: ignore[attr-defined]
    met = {
        source
        for n in nodes
        if isinstance(of[n], Grouped)
        for source in n.all_input_nodes
        if isinstance(of.get(source), PerToken)
    }
    return flattened | met


def _stage(role: Role) -> str:
    if isinstance(role, RowTable):
        return "expert"
    if isinstance(role, (Grouped, PairWeights, Combined)):
        return "post"
    return role.stage if isinstance(role, Rows) else ""


def _ancestors(node: Node, of: dict[Node, Role]) -> set[Node]:
    """The nodes of the region that ``node`` needs; the router's (PerToken) are its inputs."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            role = of.get(source)
            if role is not None and not isinstance(role, PerToken) and source not in found:
                found.add(source)
                stack.append(source)
    return found


def _the_only(nodes: Collection[Node], what: str, combined: Node) -> Node:
    if len(nodes) != 1:
        names = ", ".join(sorted(n.name for n in nodes)) or "none"
        raise Refusal(f"expected one {what}, found {names}", combined, 5)
    return next(iter(nodes))


def _check_escapes(body: Iterable[Node], needed: set[Node], of: dict[Node, Role]) -> None:
    for node in body:
        for user in node.users:
            if user not in needed and _stage(of[node]) == "expert":
                raise Refusal(f"the experts' rows are also read by {user.name}", user, 5)


def _routers(regions: Iterable[Region]) -> set[Node]:
    """Every node that a region's ids or weights are computed from, back to the tokens."""
    found: set[Node] = set()
    for region in regions:
        parts = region.parts
        stack = [n for n in (parts.select, parts.ids, parts.weights) if n is not None]
        while stack:
            node = stack.pop()
            if node in found or node is parts.tokens or value(node) is None:
                continue
            found.add(node)
            if node.target not in (aten.linear.default, aten.mm.default, aten.addmm.default):
                stack.extend(node.all_input_nodes)
    return found
