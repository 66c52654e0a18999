"""Overlap: start each exchange as early, and wait for it as late, as the dataflow allows.

Contract. In: a graph with dialect ops. Out: the same nodes in another legal order. Only pure nodes
move, and none moves across an impure one.

Pseudo-code::

    between two impure nodes:
        order = every node as it stood, but a wait and all that depends on one stand back until
                nothing else is left to run
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from moe_fx.passes.base import Context, Pass, PassResult

_WAIT = torch.ops.moe_fx.wait.default


class Overlap(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        changed = False
        for span in _pure_spans(module):
            wanted = _waits_last(span)
            if wanted != span:
                changed = True
                _reorder(span, wanted)
        if changed:
            module.graph.lint()
            module.recompile()
        return PassResult(module, changed)


def _pure_spans(module: GraphModule) -> list[list[Node]]:
    spans: list[list[Node]] = [[]]
    for node in module.graph.nodes:
        if node.op in ("call_function", "get_attr") and not node.is_impure():
            spans[-1].append(node)
        else:
            spans.append([])
    return [span for span in spans if any(node.target is _WAIT for node in span)]


def _waits_last(span: list[Node]) -> list[Node]:
    """Rounds: all that needs no further wait; then the first wait and what it sets free; …"""
    behind: dict[Node, int] = {}
    for node in span:
        depth = max((behind.get(source, 0) for source in node.all_input_nodes), default=0)
        behind[node] = depth + (node.target is _WAIT)
    return sorted(span, key=behind.__getitem__)


def _reorder(span: list[Node], wanted: list[Node]) -> None:
    before = span[0].prev
    for node in wanted:
        before.append(node)
        before = node
