"""capture, capture_all, rewritten: the graphs that a test can look at."""

from __future__ import annotations

import pytest
import torch
from torch.testing import FileCheck

from moe_fx.errors import MoeFxError
from moe_fx.testing import capture, capture_all, rewritten
from tests.testing.layers import Layer, LowestScores, TwoGraphs, tokens


def constant() -> int:
    return 1


def test_capture_is_functional_aten_with_source_lines() -> None:
    graph = capture(Layer(), tokens(12, 32))
    FileCheck().check("aten.softmax").check("aten.topk").check("aten.bmm").run(graph.code)
    (topk,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    assert "layers.py" in topk.meta["stack_trace"]


def test_capture_with_dynamic_shapes_takes_keywords() -> None:
    fixed, dynamic = (capture(Layer(), x=tokens(12, 32), dynamic=d) for d in (False, True))
    FileCheck().check("[12, 2, 32]").run(fixed.code)
    FileCheck().check_not("[12, 2, 32]").run(dynamic.code)


def test_capture_of_several_graphs_names_the_breaks() -> None:
    with pytest.raises(MoeFxError) as caught:
        capture(TwoGraphs(), tokens(12, 32))
    message = str(caught.value)
    assert "expected one graph, captured 2: moe_fx.testing.capture_all returns all" in message
    assert "graph_break()" in message
    assert "tests/testing/layers.py:" in message


def test_capture_all_returns_every_graph() -> None:
    first, second = capture_all(TwoGraphs(), tokens(12, 32))
    assert "topk" in first.code
    assert "topk" not in second.code


def test_capture_of_nothing_says_so() -> None:
    with pytest.raises(MoeFxError, match="captured none"):
        capture(constant)


@pytest.mark.parametrize("rank", [0, 1])
def test_rewritten_is_the_graph_of_one_rank(rank: int) -> None:
    graph = rewritten(Layer(), [tokens(12, 32)], world_size=2, rank=rank)
    exchange = FileCheck().check("moe_fx.permute").check("moe_fx.all_to_all")
    exchange.check(f", 0, {4 * rank}, {4 * rank + 4})").check("moe_fx.all_to_all").run(graph.code)
    FileCheck().check_not("aten.bmm").run(graph.code)


def test_rewritten_for_one_rank_exchanges_nothing_and_runs() -> None:
    layer, x = Layer(), tokens(12, 32)
    graph = rewritten(layer, [x], world_size=1)
    FileCheck().check("moe_fx.permute").check_not("all_to_all").run(graph.code)
    named = {p.meta["val"].shape: p.name for p in graph.graph.find_nodes(op="placeholder")}
    assert torch.Size([12, 32]) in named


@pytest.mark.parametrize(
    ("layer", "ranks", "said"),
    [
        (LowestScores(), 2, "declined: the selection takes the lowest scores"),
    ],
)
def test_nothing_rewritten_is_an_error_with_the_report(layer: Layer, ranks: int, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        rewritten(layer, [tokens(12, 32)], world_size=ranks)


def test_a_rank_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="0 <= rank < world_size, got 2 and 2"):
        rewritten(Layer(), [tokens(12, 32)], world_size=2, rank=2)
