"""A bug in moe_fx: the graph is compiled as without it, the report has it, and no rank hangs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import register_backend
from torch.fx import GraphModule

import moe_fx
from moe_fx.entry import net
from moe_fx.passes.normalise.normalise import Normalise
from moe_fx.passes.rewrite.rewrite import Rewrite
from moe_fx.passes.verify.verify import Verify
from moe_fx.testing import RankPool
from tests.testing.layers import Layer, tokens

STEPS = (Normalise, Verify, Rewrite)  # the first, the middle, and what makes the new graph


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(net.VARIABLE, "1")
    torch._dynamo.reset()


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("a slip of ours\nwith a second line")


GRAPHS: list[GraphModule] = []


@register_backend(name="keeps_graphs")
def keeps_graphs(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    GRAPHS.append(module)
    return module.forward


@pytest.fixture
def graphs() -> Iterator[list[GraphModule]]:
    GRAPHS.clear()
    yield GRAPHS


def compiled(model: Any, **options: Any) -> tuple[Callable[..., Any], list[moe_fx.Report]]:
    reports: list[moe_fx.Report] = []
    options = {"base": "keeps_graphs", "on_report": reports.append} | options
    return torch.compile(model, backend="moe_fx", options=options), reports


@pytest.mark.parametrize("step", STEPS)
def test_the_base_compiler_gets_dynamos_graph(
    step: type, monkeypatch: pytest.MonkeyPatch, graphs: list[GraphModule]
) -> None:
    torch.compile(Layer(), backend="keeps_graphs")(tokens(12, 32))
    monkeypatch.setattr(step, "_apply", fail)
    torch._dynamo.reset()
    model, x = Layer(), tokens(12, 32)
    call, reports = compiled(model)
    assert torch.equal(call(x), model(x))
    without, got = graphs
    assert got.code == without.code
    (report,) = reports
    assert (report.regions, report.plans, report.graphs) == ([], [], 1)
    assert len(report.bugs) == 1


def test_the_report_and_the_log_say_that_it_is_a_bug_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Verify, "_apply", fail)
    call, reports = compiled(Layer())
    with caplog.at_level(logging.ERROR, "moe_fx"):
        call(tokens(12, 32))
    (report,) = reports
    (bug,) = report.declined
    assert "ZeroDivisionError: a slip of ours." in bug.reason
    assert "This is a bug of moe_fx" in bug.reason and "report it" in bug.reason
    assert "with a second line" in bug.bug and "in fail" in bug.bug
    assert "layers.py:" in bug.source
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert bug.reason in record.getMessage() and bug.bug in record.getMessage()
    assert bug.bug.splitlines()[-1] in report.to_text()
    assert "1 by a bug of moe_fx" in str(report)
    assert "in fail" in report.to_html()
    data = json.loads(report.to_json())
    assert data["declined"][0]["bug"] == bug.bug
    jsonschema.validate(data, moe_fx.Report.json_schema())


def test_what_was_declined_before_the_bug_stays_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.testing.layers import LowestScores

    monkeypatch.setattr(Verify, "_apply", fail)
    call, reports = compiled(LowestScores())
    call(tokens(12, 32))
    assert [bool(d.bug) for d in reports[0].declined] == [False, True]


def test_explain_reports_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verify, "_apply", fail)
    report = moe_fx.explain(Layer(), tokens(12, 32))
    assert (report.regions, len(report.bugs), report.graphs) == ([], 1, 1)


def test_under_strict_a_bug_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verify, "_apply", fail)
    call, reports = compiled(Layer(), strict=True)
    with pytest.raises(Exception, match=r"NothingMatched.*a slip of ours"):
        call(tokens(12, 32))
    assert len(reports) == 1 and reports[0].bugs


def test_with_the_variable_at_0_bugs_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(net.VARIABLE, "0")
    monkeypatch.setattr(Verify, "_apply", fail)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        compiled(Layer())[0](tokens(12, 32))


@pytest.mark.parametrize(
    "error",
    [
        moe_fx.ConfigurationError("on purpose"),
        moe_fx.RanksDiffer("on purpose"),
        torch._dynamo.exc.SkipFrame("on purpose"),
        KeyboardInterrupt("on purpose"),
    ],
)
def test_what_is_raised_on_purpose_passes_through(error: BaseException) -> None:
    report = moe_fx.Report()
    caught = net.net(report, torch.fx.symbolic_trace(nn.Identity()), [], "it was tested")
    with pytest.raises(type(error), match="on purpose"), caught:
        raise error
    assert not report.declined


# -- the base compiler fails on what it is given ---------------------------------------------------


@register_backend(name="no_dialect")
def no_dialect(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    if any("moe_fx" in str(node.target) for node in module.graph.nodes):
        raise NotImplementedError("cannot compile this op")
    return module.forward


@register_backend(name="nothing_at_all")
def nothing_at_all(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    raise NotImplementedError("out of order")


def test_a_base_compiler_that_fails_on_the_rewritten_graph_gets_it_as_it_came() -> None:
    model, x = Layer(), tokens(12, 32)
    call, reports = compiled(model, base="no_dialect")
    assert torch.equal(call(x), model(x))
    (report,) = reports
    assert report.regions == []
    assert "no_dialect compiled" in report.bugs[0].reason
    assert "cannot compile this op" in report.bugs[0].bug


def test_a_base_compiler_that_fails_anyway_raises_its_own_error() -> None:
    call, reports = compiled(Layer(), base="nothing_at_all")
    with pytest.raises(Exception, match="out of order"):
        call(tokens(12, 32))
    assert [report.bugs for report in reports] == [[]]


# -- as a pass in another compiler's hook ----------------------------------------------------------


@pytest.mark.parametrize("where", ["_apply of Verify", "splice", "finish of the device"])
def test_a_post_grad_graph_stays_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fx.devices.plain import Plain
    from moe_fx.entry import graph_pass

    if where == "_apply of Verify":
        monkeypatch.setattr(Verify, "_apply", fail)
    else:
        owner: Any = graph_pass if where == "splice" else Plain
        name = where.split()[0]
        real = getattr(owner, name)

        def half(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            fail()

        monkeypatch.setattr(owner, name, half)
    rewriting = moe_fx.MoEPass()
    seen: list[tuple[str, str]] = []

    def hook(graph: torch.fx.Graph) -> None:
        before = str(graph)
        rewriting(graph)
        seen.append((before, str(graph)))

    model, x = Layer(), tokens(12, 32)
    with torch.no_grad():
        found = torch.compile(model, options={"post_grad_custom_pre_pass": Hook(hook)})(x)
        torch.testing.assert_close(found, model(x))
    ((before, after),) = seen
    assert before == after
    (report,) = rewriting.reports
    assert report.regions == [] and len(report.bugs) == 1


class Hook(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, call: Callable[[torch.fx.Graph], None]) -> None:
        self.call = call

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.call(graph)

    def uuid(self) -> None:
        return None  # not cached


# -- ranks -----------------------------------------------------------------------------------------


def on_ranks(rank: int, failing: tuple[int, ...], gathered: bool) -> tuple[Any, int, str]:
    """(difference from eager, bugs, the error if there was one) of a rank of which some fail."""
    import os

    os.environ[net.VARIABLE] = "1"
    group = dist.new_group([0, 1])  # what its ranks agree on is nobody else's
    assert isinstance(group, dist.ProcessGroup)
    real = Verify._apply
    if rank in failing:
        Verify._apply = fail  # type: ignore[method-assign]
    try:
        torch._dynamo.reset()
        model, x = Layer(), tokens(12, 32)
        expected = model(x)
        options: dict[str, Any] = {"agree_timeout": 30.0}
        if gathered:
            moe_fx.shard_experts(model, group)
        else:
            options["ep_group"] = group
        call, reports = compiled(model, base="eager", **options)
        try:
            difference = float((call(x) - expected).abs().max())
        except moe_fx.RanksDiffer as error:
            return None, len(reports[0].bugs), str(error)
        return difference, len(reports[0].bugs), ""
    finally:
        Verify._apply = real  # type: ignore[method-assign]
        os.environ[net.VARIABLE] = "0"
        dist.barrier()


@pytest.mark.parametrize("gathered", [False, True], ids=["replicated", "gathered"])
def test_a_bug_on_one_rank_is_an_error_on_all_of_them(ranks2: RankPool, gathered: bool) -> None:
    for rank, (_, bugs, error) in enumerate(ranks2.run(on_ranks, (1,), gathered)):
        assert bugs == (rank == 1)
        assert "Ranks compiled different MoE graphs" in error


@pytest.mark.parametrize("gathered", [False, True], ids=["replicated", "gathered"])
def test_a_bug_on_all_ranks_lets_them_go_on_as_they_came(ranks2: RankPool, gathered: bool) -> None:
    for difference, bugs, error in ranks2.run(on_ranks, (0, 1), gathered):
        assert error == ""
        assert difference < 1e-5
        assert bugs == 1
