"""What Dynamo captures for moe_fx, called without ``fullgraph``, and what for others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import config

import moe_fx
from moe_fx.report import Report
from tests.passes.graphs import relative_error
from tests.spellings import SPELLINGS
from tests.testing.layers import Layer, tokens

SETTINGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
LOOPS = [name for name, spelling in SPELLINGS.items() if spelling.needs_fullgraph]
SLOW = ("torchtitan_for_loop", "torchtitan_for_loop_before", "classic_qwen2")


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()


def settings() -> tuple[bool, ...]:
    return tuple(getattr(config, name) for name in SETTINGS)


def compiled(fn: Any, **options: Any) -> tuple[Any, list[Report]]:
    reports: list[Report] = []
    options = {"base": "eager", "on_report": reports.append} | options
    return torch.compile(fn, backend="moe_fx", options=options), reports


class Blocks(nn.Module):
    """Two layers of four experts; ``experts`` is how tokens meet them."""

    def __init__(self, experts: Callable[..., Tensor], layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gates = nn.ModuleList(nn.Linear(8, 4) for _ in range(layers))
        self.each = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates:
            weights, ids = gate(x).softmax(-1).topk(2)
            x = x + self.experts(x, weights, ids, self.each)
        return x


def by_where(x: Tensor, weights: Tensor, ids: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        out[token] += weights[token, slot, None] * expert(x[token])
    return out


def by_nonzero(x: Tensor, weights: Tensor, ids: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        out.index_add_(0, token, weights[token, slot, None] * expert(x[token]))
    return out


def by_mask(x: Tensor, weights: Tensor, ids: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        mask = (ids == e).any(-1)
        out[mask] += ((ids == e) * weights).sum(-1, keepdim=True)[mask] * expert(x[mask])
    return out


def skipping(x: Tensor, weights: Tensor, ids: Tensor, experts: nn.ModuleList) -> Tensor:
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        token, slot = torch.where(ids == e)
        if token.numel() == 0:
            continue
        out[token] += weights[token, slot, None] * expert(x[token])
    return out


TEST_LINE = skipping.__code__.co_firstlineno + 4


def nearest(x: Tensor, mask: Tensor) -> Tensor:
    """No MoE: one row is found, or several."""
    return x[mask.nonzero().squeeze()].sum(-1) * 2


# -- layers that are found -------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [by_where, by_nonzero, by_mask])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_loop_over_experts_is_rewritten(experts: Callable[..., Tensor], dynamic: bool) -> None:
    model, x = Blocks(experts), torch.randn(6, 8)
    call, reports = compiled(lambda x: model(x), strict=True)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        found = call(x)
        assert relative_error(model(x), found) < 1e-5
    assert [len(report.regions) for report in reports] == [1]
    assert not reports[0].breaks and settings() == (False, False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LOOPS]
)
def test_every_loop_of_the_spellings_is_found(name: str) -> None:
    spelling = SPELLINGS[name]
    model, x = spelling.build(), spelling.tokens()
    call, reports = compiled(model)
    with torch.no_grad():
        assert relative_error(model(x), call(x)) < 1e-5
    regions = [region for report in reports for region in report.regions]
    assert len(regions) == 1


def test_gradients_of_a_loop_are_those_of_the_model() -> None:
    model, x = Blocks(by_where, layers=2), torch.randn(6, 8)
    call, reports = compiled(model, base="aot_eager")
    model(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    call(x).square().sum().backward()
    assert sum(len(report.regions) for report in reports) == 2
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-5


def test_loops_behind_a_graph_break_are_found() -> None:
    """What resumes a function behind a break is captured as the function is."""
    model, x = Blocks(by_where), torch.randn(6, 8)

    def twice(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    call, reports = compiled(twice)
    with torch.no_grad():
        assert relative_error(twice(x), call(x)) < 1e-5
    assert sum(len(report.regions) for report in reports) == 2
    (found,) = [each for report in reports for each in report.breaks]
    assert found.source == f"{__file__}:{twice.__code__.co_firstlineno + 2}" and not found.hides


def test_a_recompiled_loop_is_found_again() -> None:
    model = Blocks(by_where)
    call, reports = compiled(lambda x: model(x))
    with torch.no_grad():
        for count in (6, 9):
            x = torch.randn(count, 8)
            assert relative_error(model(x), call(x)) < 1e-5
    assert [len(report.regions) for report in reports] == [1, 1]


# -- what is left as it is -------------------------------------------------------------------------


def graphs_with(backend: str, fn: Any, *args: Any, **options: Any) -> tuple[Any, int]:
    """The result, and of how many graphs."""
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result = torch.compile(fn, backend=backend, **options)(*args)
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"] - before


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_no_layer_is_captured_as_without_moe_fx(rows: int) -> None:
    """``squeeze`` of one row and of three are two programs, which a graph of both is not."""
    x, mask = torch.randn(6, 8), torch.arange(6) < rows
    wanted, graphs = graphs_with("eager", nearest, x, mask)
    found, ours = graphs_with("moe_fx", nearest, x, mask, options={"base": "eager"})
    assert torch.equal(wanted, found) and wanted.shape == nearest(x, mask).shape
    assert ours == graphs


def test_a_function_called_with_other_rows_than_when_it_was_compiled() -> None:
    x = torch.randn(6, 8)
    call, _ = compiled(nearest)
    for rows in (3, 1, 2):
        mask = torch.arange(6) < rows
        assert torch.equal(call(x, mask), nearest(x, mask))


def test_a_layer_that_needs_no_such_sizes_leaves_the_rest_as_without_moe_fx() -> None:
    layer, mask = Layer(), torch.arange(12) < 1

    def model(x: Tensor) -> Tensor:
        return nearest(layer(x), mask)

    call, reports = compiled(model)
    with torch.no_grad():
        assert relative_error(model(tokens(12, 32)), call(tokens(12, 32))) < 1e-5
    assert sum(len(report.regions) for report in reports) == 1
    assert {each.source for report in reports for each in report.breaks} == {
        f"{__file__}:{nearest.__code__.co_firstlineno + 2}"
    }


def test_a_skip_of_empty_experts_runs_as_without_moe_fx() -> None:
    model, x = Blocks(skipping), torch.randn(6, 8)
    call, reports = compiled(model)
    with torch.no_grad():
        assert relative_error(model(x), call(x)) < 1e-6
    assert not [region for report in reports for region in report.regions]


def test_a_base_compiler_that_takes_no_such_sizes_gets_none() -> None:
    """The layer is lost, but the program runs: as without moe_fx."""

    def refusing(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any("where" in str(n.target) or "nonzero" in str(n.target) for n in module.graph.nodes):
            raise NotImplementedError("a size that only running gives")
        return module.forward

    torch._dynamo.register_backend(refusing, name="refusing_sizes")
    try:
        x, mask = torch.randn(6, 8), torch.arange(6) < 3
        call, _ = compiled(nearest, base="refusing_sizes")
        assert torch.equal(call(x, mask), nearest(x, mask))
    finally:
        del torch._dynamo.backends.registry._BACKENDS["refusing_sizes"]
        del torch._dynamo.backends.registry._COMPILER_FNS["refusing_sizes"]


# -- Dynamo's configuration ------------------------------------------------------------------------


def test_another_backend_captures_as_ever_before_and_after() -> None:
    model, x = Blocks(by_where), torch.randn(6, 8)
    _, before = graphs_with("eager", model, x)
    torch._dynamo.reset()
    compiled(model)[0](x)
    assert settings() == (False, False)
    assert torch.compile(model, backend="eager")(x).shape == x.shape  # moe_fx's graphs are there
    _, after = graphs_with("eager", model, x)
    assert before == after != 1


def test_another_backend_captures_as_ever_within_a_call() -> None:
    model, x = Blocks(by_where), torch.randn(6, 8)
    seen: list[tuple[bool, ...]] = []
    sizes: list[bool] = []

    def other(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(settings())
        sizes.append(any("nonzero" in str(node.target) for node in module.graph.nodes))
        return module.forward

    inner = torch.compile(nearest, backend=other)

    @torch.compiler.disable(recursive=False)
    def between(x: Tensor) -> Tensor:
        seen.append(settings())
        return inner(x, torch.arange(6) < 3)

    def outer(x: Tensor) -> tuple[Tensor, Tensor]:
        y = model(x)
        return between(y), model(y)

    call, reports = compiled(outer)
    with torch.no_grad():
        for found, wanted in zip(call(x), outer(x), strict=True):
            assert relative_error(wanted, found) < 1e-5
    assert sum(len(report.regions) for report in reports) == 2
    assert seen and set(seen) == {(False, False)} and not any(sizes)


def test_the_base_compiler_and_other_threads_find_nothing_changed() -> None:
    model, x = Blocks(by_where), torch.randn(6, 8)
    seen: list[tuple[bool, ...]] = []

    def watching(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(settings())
        thread = threading.Thread(target=lambda: seen.append(settings()))
        thread.start()
        thread.join()
        return module.forward

    torch._dynamo.register_backend(watching, name="watching_settings")
    try:
        call, reports = compiled(model, base="watching_settings")
        call(x)
    finally:
        del torch._dynamo.backends.registry._BACKENDS["watching_settings"]
        del torch._dynamo.backends.registry._COMPILER_FNS["watching_settings"]
    assert sum(len(report.regions) for report in reports) == 1
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("disabled", [True, False])
def test_a_function_that_is_not_to_be_compiled_is_not(disabled: bool) -> None:
    """Dynamo looks who calls a function; what stands around its conversion is not to be seen."""
    compiling: list[bool] = []

    def body(x: Tensor) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    inner = torch.compiler.disable(body, recursive=False) if disabled else body
    for backend in ("eager", "moe_fx"):
        torch._dynamo.reset()
        torch.compile(lambda x: inner(x) * 2, backend=backend)(torch.ones(2))
    assert set(compiling) <= ({False} if disabled else {True, False})


# -- what is said of breaks ------------------------------------------------------------------------


def test_explain_names_the_break_that_hides_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    report = moe_fx.explain(Blocks(skipping), torch.randn(6, 8))
    (found,) = report.breaks
    assert found.source == f"{__file__}:{TEST_LINE}" and found.skipped
    assert found.reason.startswith("Data-dependent branching")
    assert "an expert without tokens adds nothing" in found.advice
    assert found.hides == (f"{__file__}:{Blocks.forward.__code__.co_firstlineno + 2}",)
    assert report.hidden == list(found.hides)
    for text in (str(report), report.to_text(), report.to_html()):
        assert "graph breaks part the routers from their experts" in text
        assert "Data-dependent branching" in text
        assert f"test_tracing.py:{TEST_LINE}" in text or f">{TEST_LINE}<" in text


def test_the_log_says_once_that_a_layer_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    call, _ = compiled(Blocks(skipping, layers=2))
    call(torch.randn(6, 8))
    (record,) = [each for each in caplog.records if "may have been missed" in each.message]
    assert f"{__file__}:{TEST_LINE}" in record.message


def test_without_any_graph_the_report_says_so() -> None:
    layer = torch.compiler.disable(Layer().forward)
    report = moe_fx.explain(lambda x: layer(x), tokens(12, 32))
    assert report.graphs == 0 and "captured no graph" in str(report)


def test_transformers_loop_over_experts_is_named_with_the_way_out() -> None:
    from moe_fx.cli.tiny import tiny_model

    model = tiny_model("qwen3_moe")
    model.set_experts_implementation("eager")
    ids = torch.arange(12)[None]
    report = moe_fx.explain(model, ids, use_cache=False)
    hiding = [each for each in report.breaks if each.hides]
    assert not report.regions and hiding
    assert 'experts_implementation="grouped_mm"' in hiding[0].advice
    call, _ = compiled(model)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        assert relative_error(wanted, call(ids, use_cache=False).logits) < 1e-5


class Wide(nn.Module):
    """Layers of which each fills a bucket of DDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.up = nn.Parameter(torch.randn(4, 64, 1500))
        self.down = nn.Parameter(torch.randn(4, 1500, 64))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        rows = torch.relu(torch.einsum("th,tkhi->tki", x, self.up[ids]))
        rows = torch.einsum("tki,tkih->tkh", rows, self.down[ids])
        return x + (rows * weights[..., None]).sum(1)


def test_what_ddp_cuts_is_named_with_the_way_out() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            nn.Sequential(Wide(), Wide(), Wide()), bucket_cap_mb=2
        )
        report = moe_fx.explain(model, torch.randn(12, 64))
        assert not report.regions
        (found,) = report.breaks
        assert "DistributedDataParallel" in found.reason and found.hides
        assert "torch._dynamo.config.optimize_ddp = False" in found.advice
        with config.patch(optimize_ddp=False):
            report = moe_fx.explain(model, torch.randn(12, 64))
        assert report.regions and not report.missed and not report.breaks
    finally:
        dist.destroy_process_group()


# -- strict ----------------------------------------------------------------------------------------


def test_strict_judges_the_model_and_not_its_loss() -> None:
    layer = Layer()

    def step(x: Tensor) -> Tensor:
        y = layer(x)
        torch._dynamo.graph_break()
        return (y - x).square().mean()

    call, reports = compiled(step, strict=True)
    assert torch.allclose(call(tokens(12, 32)), step(tokens(12, 32)))
    assert [len(report.regions) for report in reports] == [1, 0]


def test_strict_waits_for_layers_behind_a_break() -> None:
    layer = Layer()

    def model(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        return layer(y)

    call, _ = compiled(model, strict=True)
    assert torch.allclose(call(tokens(12, 32)), model(tokens(12, 32)), atol=1e-5)


@pytest.mark.parametrize("broken", [False, True])
def test_strict_refuses_a_model_without_experts(broken: bool) -> None:
    def model(x: Tensor) -> Tensor:
        y = x * 2
        if broken:
            torch._dynamo.graph_break()
        return y.relu()

    call, _ = compiled(model, strict=True)
    with pytest.raises(Exception, match="no MoE layer was found") as raised:
        call(tokens(12, 32))
    assert "0 MoE layers" not in str(raised.value)


def test_strict_refuses_a_layer_that_a_break_hides() -> None:
    call, _ = compiled(Blocks(skipping), strict=True)
    with pytest.raises(moe_fx.NothingMatched, match=f"test_tracing.py:{TEST_LINE}"):
        call(torch.randn(6, 8))


def test_strict_refuses_experts_that_are_not_compiled() -> None:
    """Of two layers one is found; the other's experts are behind a break."""
    layer = Layer()
    hidden = Blocks(torch.compiler.disable(by_where))

    def model(x: Tensor) -> Tensor:
        return hidden.gates[0](layer(x)[:, :8])

    def both(x: Tensor) -> Tensor:
        x = layer(x)[:, :8]
        weights, ids = hidden.gates[0](x).softmax(-1).topk(2)
        return hidden.experts(x, weights, ids, hidden.each)

    call, _ = compiled(model, strict=True)
    call(tokens(12, 32))
    call, _ = compiled(both, strict=True)
    with pytest.raises(Exception, match="graph breaks hide the experts"):
        call(tokens(12, 32))
