"""Overlap: start each exchange as early, and wait for it as late, as compute allows.

Contract. In: a graph with dialect ops. Out: the same nodes in another legal order (`schedule.py`),
in which waits stand behind what hides them; only nodes with ``meta["val"]`` have costs. Nothing
moves across a node that writes to its inputs. With ``pinned``, each wait also takes, as
``wait_after``, the starts and matrix products that stand between it and the wait before: so the
order holds in whatever a compiler that reorders by dependencies makes of the graph, and no product
is fused with what follows a wait.

Pseudo-code::

    between two nodes that write:
        wanted = schedule(nodes, costs)
        leave the order that is there if wanted takes as long, or more than ``memory`` times as much
            memory (said in the log)
        pinned: wait -> wait_after(..., the last wait and what was placed since, unless implied)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.overlap.node_costs import GraphCosts, is_heavy
from moe_fx.passes.overlap.schedule import STARTS, WAITS, peak_bytes, schedule, simulate

log = logging.getLogger("moe_fx")

_WAIT_AFTER = torch.ops.moe_fx.wait_after.default


class Overlap(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        options = context.options
        changed = options.overlap != "off" and overlap(module.graph, options.overlap_memory)
        if changed:
            module.graph.lint()
            module.recompile()
        return PassResult(module, changed)


def overlap(graph: Graph, memory: float, pinned: bool = False) -> bool:
    """Reorder ``graph`` in place; whether anything changed. memory: the most bytes alive at once,
    over those of the order that was."""
    spans = _spans(graph)
    if not spans:
        return False
    costs = GraphCosts(graph)
    changed = False
    for span in spans:
        wanted = _better(span, costs, memory)
        if wanted is not span:
            changed = True
            _reorder(span, wanted)
        if pinned:
            changed |= _pin(wanted)
    return changed


def _better(span: list[Node], costs: GraphCosts, memory: float) -> list[Node]:
    wanted = schedule(span, costs)
    if simulate(wanted, costs).seconds >= simulate(span, costs).seconds:
        return span
    before, after = (peak_bytes(order, costs.bytes, costs.base) for order in (span, wanted))
    if after > memory * before:
        log.info(
            "overlap: the faster order of %d nodes would take %.2f times the memory of the "
            "captured one, more than overlap_memory=%g: left as captured",
            len(span),
            after / max(1, before),
            memory,
        )
        return span
    return wanted


def _spans(graph: Graph) -> list[list[Node]]:
    """Runs of nodes that write to none of their inputs, where there is something to order."""
    spans: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and not _writes(node):
            spans[-1].append(node)
        else:
            spans.append([])
    return [span for span in spans if any(node.target in WAITS for node in span)]


def _writes(node: Node) -> bool:
    """Or has another effect that others may see, but for checks and random numbers."""
    schema = getattr(node.target, "_schema", None)
    return node.is_impure() if schema is None else bool(schema.is_mutable)


def _reorder(span: list[Node], wanted: list[Node]) -> None:
    before = span[0].prev
    for node in wanted:
        before.append(node)
        before = node


def _pin(order: Sequence[Node]) -> bool:
    at = {node: position for position, node in enumerate(order)}
    since: list[Node] = []
    changed = False
    for node in order:
        if node.target in WAITS:
            needed = _above([node], since, at)
            heavy = [n for n in since if n not in needed]
            behind = _above(heavy, since, at)
            after = [n for n in heavy if n not in behind]
            if after:
                node.target = _WAIT_AFTER
                given = [*node.args[:6], None]
                node.args = (*given[:6], after)
                node.kwargs = {}
                changed = True
            since = [node]
        elif node.target in STARTS or is_heavy(node):
            since.append(node)
    return changed


def _above(nodes: Sequence[Node], since: Sequence[Node], at: dict[Node, int]) -> set[Node]:
    """What ``nodes`` need of the nodes from the first of ``since`` on."""
    if not since:
        return set()
    first = at[since[0]]
    found: set[Node] = set()
    stack = [source for node in nodes for source in node.all_input_nodes]
    while stack:
        source = stack.pop()
        if source not in found and at.get(source, -1) >= first:
            found.add(source)
            stack.extend(source.all_input_nodes)
    return found
