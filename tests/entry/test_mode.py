"""``mode=``: what it means for Inductor; and what else torch.compile hands to a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import moe_fx
from moe_fx.bases import inductor as order
from moe_fx.entry.backend import moe_fx_backend
from moe_fx.plan import ExchangePlan
from tests.testing.layers import Layer, tokens

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The settings that Inductor is given, without its taking the time to compile."""
    given: list[dict[str, Any]] = []

    def compiler(
        module: GraphModule, inputs: Any, config_patches: dict[str, Any] | None = None
    ) -> Callable[..., Any]:
        given.append(config_patches or {})
        return module.forward

    monkeypatch.setattr(order, "base_compiler", lambda name: compiler)
    torch._dynamo.reset()
    yield given


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_inductors(mode: str, patches: list[dict[str, Any]]) -> None:
    model, x = Layer(), tokens(12, 32)
    with torch.no_grad():
        torch.compile(model, backend="moe_fx", mode=mode)(x)
    assert patches == [torch._inductor.list_mode_options(mode)]


def test_the_option_is_the_same_and_goes_with_others(patches: list[dict[str, Any]]) -> None:
    options = {"mode": "max-autotune", "base_options": {"max_autotune": False, "dce": True}}
    with torch.no_grad():
        torch.compile(Layer(), backend="moe_fx", options=options)(tokens(12, 32))
    expected = torch._inductor.list_mode_options("max-autotune")
    assert patches == [expected | {"max_autotune": False, "dce": True}]


@pytest.mark.parametrize("base", ["inductor", "eager"])
def test_the_default_mode_is_for_every_base(base: str, patches: list[dict[str, Any]]) -> None:
    moe_fx.Options(base=base, mode="default")
    with torch.no_grad():
        torch.compile(Layer(), backend="moe_fx", mode="default")(tokens(12, 32))
    assert patches == [{}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "fastest"}, "Unrecognized mode=fastest, should be one of: default"),
        ({"mode": "max-autotune", "options": {"base": "eager"}}, "is for base='inductor'"),
        ({"mode": "max-autotune", "options": {"mode": "reduce-overhead"}}, "differ"),
        ({"speed": 3, "colour": "red"}, "takes no colour, speed"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], said: str) -> None:
    module = torch.fx.symbolic_trace(Layer().gate)
    with pytest.raises(moe_fx.ConfigurationError, match=said):
        moe_fx_backend(module, [tokens(12, 32)], **given)


SYNCS = ExchangePlan("alltoall", 8, 4, "group", 2)
SAFE = replace(SYNCS, strategy="allgather")


@pytest.mark.parametrize(("plan", "graphs"), [(SYNCS, False), (SAFE, True)])
@pytest.mark.parametrize("how", ["mode", "base_options", "global"])
def test_cuda_graphs_are_off_where_the_host_waits_for_the_device(
    plan: ExchangePlan, graphs: bool, how: str, patches: list[dict[str, Any]]
) -> None:
    options = moe_fx.Options(
        mode="reduce-overhead" if how == "mode" else None,
        base_options={"triton.cudagraphs": True} if how == "base_options" else {},
    )
    report = moe_fx.Report(plans=[SAFE, plan])
    module = torch.fx.symbolic_trace(Layer().gate)
    with torch._inductor.config.patch({"triton.cudagraphs": how == "global"}):
        order.compile_by_base(module, [tokens(12, 32)], options, report, training=False)
    on = patches[0].get("triton.cudagraphs", how == "global")
    assert on == graphs
    noted = ["CUDA graphs are off" in note and "split_sizes" in note for note in report.notes]
    assert noted == [True] * (not graphs)
    for text in (report.to_text(), report.to_html(), str(report), report.to_json()):
        assert ("CUDA graphs are off" in text) == (not graphs)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_fullgraph_and_dynamic(fullgraph: bool, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model, reports = Layer(), []
    options = {"base": "eager", "on_report": reports.append}
    compiled = torch.compile(
        model, backend="moe_fx", fullgraph=fullgraph, dynamic=dynamic, options=options
    )
    for count in (12, 7):
        x = tokens(count, 32)
        torch.testing.assert_close(compiled(x), model(x))
    assert all(len(report.regions) == 1 for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inductor_compiles_in_each_mode(mode: str) -> None:
    torch._dynamo.reset()
    model, x = Layer(), tokens(12, 32)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        call(x).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = [g.clone() for g in gradients(model)]
    found = gradients(torch.compile(model, backend="moe_fx", mode=mode))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
