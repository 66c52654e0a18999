"""Overlap: shared experts run while the exchange does; nothing that must not move moves."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx import passes
from moe_fx.options import Options
from moe_fx.passes.base import PassResult
from moe_fx.passes.overlap import overlap as overlapping
from moe_fx.passes.overlap.overlap import Overlap
from moe_fx.report import Report
from tests.models import build, token_ids
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    relative_error,
    run_ranks,
    tokens,
)

aten, ops = torch.ops.aten, torch.ops.moe_fx
WORLD = 2
BEFORE_OVERLAP = tuple(step for step in passes.PIPELINE if not isinstance(step, Overlap))


@pytest.fixture(scope="module")
def case() -> Captured:
    return captured(block("deepseek_v3"), tokens(1, 12, 64))


def exchanging(module: GraphModule, rank: int = 0) -> GraphModule:
    """Rewritten for one of two ranks, its nodes as the rewrite left them."""
    context = passes.Context(options=Options(verify="off"), report=Report())
    result = passes.run(module, context, passes.for_ranks(WORLD, rank, BEFORE_OVERLAP))
    assert result is not module
    return result


def overlap(module: GraphModule) -> PassResult:
    return Overlap()(module, passes.Context(options=Options(), report=Report()))


def nodes_of(module: GraphModule, target: Any) -> list[Node]:
    return [node for node in module.graph.nodes if node.target is target]


def positions(module: GraphModule, *nodes: Node) -> list[int]:
    order = {node: at for at, node in enumerate(module.graph.nodes)}
    return [order[node] for node in nodes]


def shared_linears(module: GraphModule) -> list[Node]:
    """All linears but the router's, which is the first."""
    return nodes_of(module, aten.linear.default)[1:]


def check_legal(module: GraphModule) -> None:
    module.graph.lint()
    seen: set[Node] = set()
    for node in module.graph.nodes:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)


def test_shared_experts_run_between_the_start_of_the_exchange_and_its_wait(case: Captured) -> None:
    module = exchanging(case.module)
    assert overlap(module).changed
    shared = shared_linears(module)
    assert len(shared) == 3
    start, *_ = nodes_of(module, ops.all_to_all.default)
    wait, *_ = nodes_of(module, ops.wait.default)
    first, *between, last = positions(module, start, *shared, wait)
    assert all(first < at < last for at in between)


def test_before_overlap_the_exchange_is_waited_for_at_once(case: Captured) -> None:
    module = exchanging(case.module)
    wait, *_ = nodes_of(module, ops.wait.default)
    assert max(positions(module, wait)) < min(positions(module, *shared_linears(module)))


def test_every_start_stands_before_its_wait_and_starts_keep_their_order(case: Captured) -> None:
    module = exchanging(case.module)
    starts = nodes_of(module, ops.all_to_all.default)
    overlap(module)
    waits = nodes_of(module, ops.wait.default)
    assert nodes_of(module, ops.all_to_all.default) == starts
    assert [wait.args[0] for wait in waits] == starts
    for start, wait in zip(starts, waits, strict=True):
        assert positions(module, start) < positions(module, wait)


def test_the_new_order_is_legal_and_has_the_same_nodes(case: Captured) -> None:
    module = exchanging(case.module)
    before = set(module.graph.nodes)
    inputs = {node: node.all_input_nodes for node in before}
    overlap(module)
    check_legal(module)
    assert set(module.graph.nodes) == before
    assert {node: node.all_input_nodes for node in before} == inputs


def test_an_order_that_takes_too_much_memory_is_left_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graph = Graph()
    tokens, sizes = graph.placeholder("tokens"), graph.placeholder("sizes")
    start = graph.call_function(ops.all_to_all.default, (tokens, sizes, sizes, "g"))
    wait = graph.call_function(ops.wait.default, (start, tokens, sizes, sizes, "g"))
    small = graph.call_function(aten.neg.default, (wait,))
    large = graph.call_function(aten.cat.default, ([tokens] * 8,))
    narrowed = graph.call_function(aten.sum.default, (large,))
    graph.output((small, narrowed))
    for node, size in ((small, 8), (large, 64), (narrowed, 1)):
        node.meta["val"] = torch.empty(size)
    order = list(graph.nodes)
    caplog.set_level("INFO", logger="moe_fx")
    with mock.patch.object(overlapping, "peak_bytes", side_effect=[100, 126]):
        assert not overlapping.overlap(graph, memory=1.25)
    assert list(graph.nodes) == order
    assert "1.26 times the memory" in caplog.text
    with mock.patch.object(overlapping, "peak_bytes", side_effect=[100, 125]):
        assert overlapping.overlap(graph, memory=1.25)
    assert list(graph.nodes).index(large) < list(graph.nodes).index(wait)


def test_numbers_are_unchanged(case: Captured) -> None:
    inputs = [case.other_inputs(seed=30 + rank) for rank in range(WORLD)]
    graphs = [exchanging(case.module, rank) for rank in range(WORLD)]
    with torch.no_grad():
        expected = [case.module(*values) for values in inputs]
    before = run_ranks(graphs, inputs)
    for graph in graphs:
        overlap(graph)
    after = run_ranks(graphs, inputs)
    assert relative_error(before, after) == 0
    assert relative_error(expected, after) <= 1e-5


def test_a_second_time_changes_nothing(case: Captured) -> None:
    module = exchanging(case.module)
    overlap(module)
    order = list(module.graph.nodes)
    assert not overlap(module).changed
    assert list(module.graph.nodes) == order


def test_a_graph_without_an_exchange_is_left_as_it_is(case: Captured) -> None:
    order = list(case.module.graph.nodes)
    assert not overlap(case.module).changed
    assert list(case.module.graph.nodes) == order


# -- impure nodes ----------------------------------------------------------------------------------


def insert(module: GraphModule, before: Node, target: Any, *args: Any) -> Node:
    with module.graph.inserting_before(before):
        return module.graph.call_function(target, args)


def sides(module: GraphModule, node: Node) -> tuple[set[Node], set[Node]]:
    """The nodes before and after."""
    order = list(module.graph.nodes)
    at = order.index(node)
    return set(order[:at]), set(order[at + 1 :])


IMPURE = {
    "copy into an input": lambda module, tokens: (aten.copy_.default, tokens, tokens),
    "gradient mode": lambda module, tokens: (torch._C._set_grad_enabled, False),
}


@pytest.mark.parametrize("kind", IMPURE)
def test_impure_nodes_keep_their_place_and_nothing_crosses_them(case: Captured, kind: str) -> None:
    module = exchanging(case.module)
    placeholder = next(iter(module.graph.nodes))
    middle = shared_linears(module)[1]
    barrier = insert(module, middle, *IMPURE[kind](module, placeholder))
    assert barrier.is_impure()
    before, after = sides(module, barrier)
    overlap(module)
    assert sides(module, barrier) == (before, after)
    check_legal(module)
    output = next(iter(reversed(module.graph.nodes)))
    assert output.op == "output"


def test_an_impure_node_before_the_exchange_does_not_keep_it_from_overlapping(
    case: Captured,
) -> None:
    module = exchanging(case.module)
    placeholder = next(iter(module.graph.nodes))
    router = nodes_of(module, aten.linear.default)[0]
    insert(module, router, aten.copy_.default, placeholder, placeholder)
    overlap(module)
    wait, *_ = nodes_of(module, ops.wait.default)
    assert max(positions(module, *shared_linears(module))) < positions(module, wait)[0]


def test_a_cache_update_at_the_end_still_sees_the_values_of_the_graph(case: Captured) -> None:
    module = exchanging(case.module)
    output = next(iter(reversed(module.graph.nodes)))
    placeholder = next(iter(module.graph.nodes))
    update = insert(module, output, aten.copy_.default, placeholder, output.args[0][0])
    overlap(module)
    assert list(module.graph.nodes)[-2:] == [update, output]


# -- several layers --------------------------------------------------------------------------------


def test_each_layer_of_a_model_overlaps_its_own_shared_experts() -> None:
    model, config = build("deepseek_v3")
    case = captured(
        lambda ids: model(input_ids=ids, use_cache=False).logits, token_ids(config, 1, 8)
    )
    module = exchanging(case.module)
    overlap(module)
    check_legal(module)
    starts = positions(module, *nodes_of(module, ops.all_to_all.default))
    waits = positions(module, *nodes_of(module, ops.wait.default))
    linears = positions(module, *nodes_of(module, aten.linear.default))
    assert len(starts) == len(waits) == 4
    assert sorted(starts + waits) == [at for pair in zip(starts, waits, strict=True) for at in pair]
    for dispatch in (0, 2):
        assert sum(starts[dispatch] < at < waits[dispatch] for at in linears) == 3
