"""A graph that would hang, or read what has not arrived, is refused between stages."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from moe_fx import passes
from moe_fx.passes.legal import IllegalGraph, check_order, check_pairs, collectives
from moe_fx.passes.overlap.schedule import STARTS, WAITS
from tests.passes.graphs import block, captured, rewritten, tokens


@pytest.fixture
def graph() -> GraphModule:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    made, report = rewritten(case.module, 2, overlap=2)
    assert made is not None, report.declined
    check_pairs(made.graph)
    return made


def test_an_exchange_that_nothing_waits_for(graph: GraphModule) -> None:
    wait = next(node for node in reversed(graph.graph.nodes) if node.target in WAITS)
    with graph.graph.inserting_before(wait):
        instead = graph.graph.call_function(torch.ops.aten.zeros_like.default, (wait.args[1],))
    wait.replace_all_uses_with(instead)
    graph.graph.erase_node(wait)
    with pytest.raises(IllegalGraph, match="nothing waits for all_to_all"):
        check_pairs(graph.graph)


def test_an_exchange_that_is_waited_for_twice(graph: GraphModule) -> None:
    wait = next(node for node in graph.graph.nodes if node.target in WAITS)
    with graph.graph.inserting_after(wait):
        graph.graph.call_function(wait.target, wait.args, wait.kwargs)
    with pytest.raises(IllegalGraph, match="not waited for yet"):
        check_pairs(graph.graph)


def test_collectives_in_another_order(graph: GraphModule) -> None:
    before = collectives(graph.graph)
    check_order(before, graph.graph)
    first, second = [node for node in before if node.target in STARTS][:2]
    first.prepend(second)
    with pytest.raises(IllegalGraph, match="order of collectives"):
        check_order(before, graph.graph)


def test_the_pipeline_refuses_what_overlap_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def reverses(self: passes.Pass, module: GraphModule, context: passes.Context) -> object:
        first, second = [n for n in module.graph.nodes if n.target in STARTS][:2]
        first.prepend(second)
        return passes.PassResult(module, changed=True)

    monkeypatch.setattr(passes.Overlap, "_apply", reverses)
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    with pytest.raises(IllegalGraph, match="order of collectives"):
        rewritten(case.module, 2, overlap=2)
