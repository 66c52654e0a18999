"""What has no MoE layer, or none that is accepted, goes on as it came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule

from moe_fx import passes
from moe_fx.entry.backend import rewrite
from moe_fx.options import Options
from moe_fx.passes.verify import verify
from moe_fx.report import Report
from moe_fx.testing import assert_matches
from tests.passes.graphs import block, captured, relative_error, tokens
from tests.passes.grouped import Grouped


class Recorder:
    """A base compiler that keeps the graphs it is given, with their text at that time."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.codes: list[str] = []

    def __call__(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        self.codes.append(module.code)
        return module.forward


BASE = Recorder()


@register_backend(name="recorder_of_untouched")
def recorder_of_untouched(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return BASE(module, inputs)


@pytest.fixture
def base() -> Recorder:
    BASE.graphs.clear()
    BASE.codes.clear()
    torch._dynamo.reset()
    return BASE


def dynamo_graphs(model: Callable[..., Any], *args: Any) -> list[GraphModule]:
    """What Dynamo hands to any backend."""
    recorder = Recorder()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=recorder)(*args)
    torch._dynamo.reset()
    return recorder.graphs


def compile_and_run(model: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report]:
    report = Report()
    options |= {"base": "recorder_of_untouched", "on_report": report.extend}
    with torch.no_grad():
        result = torch.compile(model, backend="moe_fx", options=options)(*args)
    return result, report


def nodes(module: GraphModule) -> list[tuple[str, str, str]]:
    return [(node.op, node.name, str(node.target)) for node in module.graph.nodes]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Sampling(Grouped):
    def forward(self, x: Tensor) -> Any:
        values, ids = (x @ self.router).topk(4, dim=-1)
        return ids.gather(-1, values.softmax(-1).argmax(-1, keepdim=True))


class DescendingSort(Grouped):
    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)  # type: ignore[return-value]


class Cache(Dense):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(12, 32))

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.last.copy_(result)
        return result.sum(0)


NOT_MOE = {"dense": Dense, "with a cache": Cache, "sampling": Sampling, "declined": DescendingSort}


@pytest.mark.parametrize("name", NOT_MOE)
def test_the_base_compiler_gets_what_dynamo_made(base: Recorder, name: str) -> None:
    model, x = NOT_MOE[name](), tokens(12, 32)
    (expected,) = dynamo_graphs(model, x)
    result, report = compile_and_run(model, x)
    (graph,) = base.graphs
    assert base.codes == [expected.code]
    assert nodes(graph) == nodes(expected)
    assert not any("aten." in target or "moe_fx." in target for *_, target in nodes(graph))
    assert report.regions == []
    assert bool(report.declined) == (name in ("sampling", "declined"))
    assert relative_error(model(x), result) == 0


@pytest.mark.parametrize("name", NOT_MOE)
def test_rewrite_returns_the_very_graph_it_was_given_and_leaves_it_alone(name: str) -> None:
    x = tokens(12, 32)
    (graph,) = dynamo_graphs(NOT_MOE[name](), x)
    case = captured(NOT_MOE[name](), x)
    before, text, order = graph.graph, graph.code, nodes(graph)
    metas = [dict(node.meta) for node in graph.graph.nodes]
    groups: set[str] = set()
    assert rewrite(case.dynamo, case.inputs, Options(), Report(), groups)[1] is case.dynamo
    report = Report()
    local, result, _ = rewrite(graph, case.inputs, Options(), report, groups)
    assert result is local.module is graph and not groups
    assert (graph.graph, graph.code, nodes(graph)) == (before, text, order)
    assert [dict(node.meta) for node in graph.graph.nodes] == metas
    assert report.graphs == 1


@pytest.mark.parametrize("name", ["dense", "sampling", "declined"])
def test_the_pipeline_returns_the_very_module_and_leaves_it_alone(name: str) -> None:
    module = captured(NOT_MOE[name](), tokens(12, 32)).module
    text, order = module.code, list(module.graph.nodes)
    args = [node.args for node in order]
    report = Report()
    context = passes.Context(options=Options(), report=report)
    assert passes.run(module, context) is module
    assert module.code == text
    assert list(module.graph.nodes) == order
    assert [node.args for node in order] == args


def test_a_graph_without_a_selection_is_not_even_captured(
    monkeypatch: pytest.MonkeyPatch, base: Recorder
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr("moe_fx.entry.backend.capture", never)
    _, report = compile_and_run(Dense(), tokens(12, 32))
    assert (report.graphs, report.regions, report.declined) == (1, [], [])


def test_what_verification_declines_goes_on_as_dynamo_made_it(
    monkeypatch: pytest.MonkeyPatch, base: Recorder
) -> None:
    model, x = Grouped(), tokens(12, 32)
    (expected,) = dynamo_graphs(model, x)
    monkeypatch.setattr(verify, "difference", lambda *args: "planted")
    result, report = compile_and_run(model, x)
    assert base.codes == [expected.code]
    assert [declined.reason for declined in report.declined] == ["planted"]
    assert relative_error(model(x), result) == 0


def test_an_accepted_layer_is_rewritten_in_a_copy(base: Recorder) -> None:
    case = captured(block("qwen3_moe"), tokens(1, 12, 64))
    text, order = case.module.code, list(case.module.graph.nodes)
    context = passes.Context(options=Options(), report=Report())
    result = passes.run(case.module, context)
    assert result is not case.module
    assert "moe_fx.permute" in result.code
    assert case.module.code == text
    assert list(case.module.graph.nodes) == order


def test_explaining_a_model_does_not_change_what_it_computes() -> None:
    model, x = Grouped(), tokens(12, 32)
    before = model(x)
    assert_matches(model, [x])
    assert torch.equal(model(x), before)
