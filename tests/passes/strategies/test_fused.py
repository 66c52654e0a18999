"""Local layers whose experts are one op: equal to the captured, and left alone where they must."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import moe_fx
from moe_fx.plan import Fused
from moe_fx.report import Report
from tests import families
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    error_on_ranks,
    op_names,
    relative_error,
    rewritten,
    tokens,
)
from tests.passes.grouped import Grouped
from tests.spellings import SPELLINGS

SILU = Fused("halves", "silu")
SEPARATE = Fused("separate", "silu")
CLAMPED = Fused("interleaved", "silu", 1.702, 7.0, 1.0)
RELU2 = Fused("single", "relu2")


def model_of(family: str, impl: str = "grouped_mm") -> nn.Module:
    return families.build(family, impl)[0] if family == "mixtral" else block(family, impl)


def fused_ops(module: GraphModule) -> list[str]:
    return [name for name in op_names(module) if "fused_experts" in name]


def compiled(case: Captured, **given: Any) -> tuple[GraphModule, Report, list[str]]:
    """(the rewritten graph, the report, why experts were not fused)."""
    graph, report = rewritten(case.module, lower="cuda", **given)
    assert graph is not None, report.declined
    kept = [each.kept for each in report.lowered if each.op == "experts" and each.kept]
    return graph, report, kept


# -- what is fused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(
    ("family", "read"),
    [
        ("qwen3_moe", SILU),
        ("mixtral", SILU),
        ("deepseek_v3", SILU),
        ("gpt_oss", CLAMPED),
        ("nemotron_h", RELU2),
    ],
)
def test_blocks_of_transformers(family: str, read: Fused, impl: str) -> None:
    case = captured(model_of(family, impl), tokens(1, 13, 64))
    graph, report, _ = compiled(case)
    assert report.plans[0].fused == read
    assert report.plans[0].summary == "local, fused"
    assert fused_ops(graph) == ["moe_fx.fused_experts.default"]
    assert not {"moe_fx.permute.default", "moe_fx.grouped_mm.default"} & {*op_names(graph)}
    [done] = [each for each in report.lowered if each.op == "experts"]
    assert (done.to, done.kept) == (("moe_fx::fused_experts",), "") and done.source
    assert error_on_ranks(case, [graph]) <= 1e-5


FUSED = {
    "gpt_fast": SEPARATE,
    "gpt_oss_reference": CLAMPED,
    "gathered_one_hot": SEPARATE,
    "torchtitan_grouped": SEPARATE,
    "torchtitan_grouped_shared": SEPARATE,
    "sorted_index_add": SEPARATE,
    "classic_mixtral_stacked": replace(SEPARATE, up_first=True),
    "dense_einsum": SEPARATE,
    "dense_einsum_3d": SEPARATE,
    "llama4_after": SILU,
    "gpt_oss_dense": CLAMPED,
    "padded_slots": SEPARATE,
    "hf_jetmoe": SILU,
}


@pytest.mark.parametrize("name", FUSED)
def test_spellings(name: str) -> None:
    spelling = SPELLINGS[name]
    case = captured(spelling.build(), spelling.tokens())
    graph, report, kept = compiled(case)
    assert not kept and report.plans[0].fused == FUSED[name]
    assert fused_ops(graph) == ["moe_fx.fused_experts.default"]
    assert error_on_ranks(case, [graph]) <= 1e-5


def test_bfloat16() -> None:
    case = captured(block("gpt_oss", dtype=torch.bfloat16), tokens(1, 13, 64, dtype=torch.bfloat16))
    graph, report, _ = compiled(case)
    assert report.plans[0].fused == CLAMPED
    assert error_on_ranks(case, [graph]) <= 2e-2


def test_tables_are_those_of_the_graph_and_no_copies() -> None:
    graph, *_ = compiled(captured(block("qwen3_moe"), tokens(1, 13, 64)))
    [node] = graph.graph.find_nodes(
        op="call_function", target=torch.ops.moe_fx.fused_experts.default
    )
    for table in (node.args[3], node.args[5]):
        assert table.target is torch.ops.aten.transpose.int
        assert table.args[0].op == "placeholder"


def test_any_number_of_tokens() -> None:
    model = block("qwen3_moe")
    case = captured(model, tokens(2, 13, 64), dynamic=True)
    graph, *_ = compiled(case)
    assert fused_ops(graph)
    run = torch.compile(model, backend="moe_fx", dynamic=True, options=OPTIONS)
    with torch.no_grad():
        for length in (13, 1, 7):
            x = tokens(2, length, 64)
            assert relative_error(model(x), run(x)) <= 1e-5


def test_not_unless_the_device_fuses() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    for lower in ("auto", "off"):
        graph, report = rewritten(case.module, lower=lower)
        assert graph is not None and not fused_ops(graph)
        assert report.plans[0].fused is None and report.lowered == []


def test_not_where_tokens_travel() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    graph, report = rewritten(case.module, 2, lower="cuda")
    assert graph is not None and not fused_ops(graph)
    assert report.plans[0].fused is None


# -- gradients -------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"base": "aot_eager", "lower": "cuda", "strict": True, "progress": False}


def gradients(model: nn.Module, run: Callable[..., Any], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(x)
    out = out[0] if isinstance(out, tuple) else out
    (out * tokens(*out.shape, seed=3)).sum().backward()
    leaves = {"x": x, **dict(model.named_parameters())}
    return [
        out.detach(),
        *(t.grad for t in leaves.values() if t.grad is not None),
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_gradients_of_every_parameter(family: str) -> None:
    model = model_of(family)
    reports: list[Report] = []
    run = torch.compile(model, backend="moe_fx", options=OPTIONS | {"on_report": reports.append})
    expected = gradients(model, model, tokens(1, 13, 64))
    found = gradients(model, run, tokens(1, 13, 64))
    assert len(expected) == len(found) > 3
    assert relative_error(expected, found) <= 1e-4
    [report] = reports
    assert report.plans[0].fused is not None and report.plans[0].fused.trains
    verification = report.regions[0].verification
    assert verification is not None and "tokens" in verification.gradients
    assert any("down_proj" in name for name in verification.gradients)
    assert [each.to for each in report.lowered] == [("moe_fx::fused_experts_training",)]


def test_a_spelling_read_by_value_trains() -> None:
    spelling = SPELLINGS["dense_einsum"]
    case = captured(spelling.build().requires_grad_(True), spelling.tokens())
    graph, report, _ = compiled(case, training=True)
    assert fused_ops(graph) == ["moe_fx.fused_experts_training.default"]
    assert report.regions[0].verification is not None
    assert "tokens" in report.regions[0].verification.gradients


def test_in_an_activation_checkpoint() -> None:
    model = block("qwen3_moe")

    def checkpointed(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    reports: list[Report] = []
    run = torch.compile(
        checkpointed, backend="moe_fx", options=OPTIONS | {"on_report": reports.append}
    )
    x = tokens(1, 13, 64)
    expected, found = gradients(model, model, x), gradients(model, run, x)
    assert relative_error(expected, found) <= 1e-4
    assert reports[0].plans[0].fused is not None


# -- what is not -----------------------------------------------------------------------------------


class Between(Grouped):
    """``between`` as given."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._between = between

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return self._between(rows)


def halved(rows: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return act(gate) * up


class Scaled(Grouped):
    """The experts' results have a factor before the weights."""

    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        product = super().grouped(rows, table, offsets)
        return product * 0.5 if table is self.down else product


class Halved(Grouped):
    """Tables that are computed in the forward."""

    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return super().grouped(rows, table * 0.5, offsets)


class Cast(Grouped):
    """Rows and tables in another dtype than the tokens."""

    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return super().grouped(rows.bfloat16(), table.bfloat16(), offsets).float()


KEPT: dict[str, tuple[nn.Module, str]] = {
    "an unknown op": (
        Between(lambda rows: halved(rows, torch.sin)),
        "aten.sin between the experts' matmuls is no activation that the kernels know",
    ),
    "a limit below as well": (
        Between(lambda rows: halved(rows, lambda g: F.silu(g.clamp(-0.5, 0.5)))),
        "is no activation that the kernels know",
    ),
    "a norm": (
        Between(lambda rows: F.layer_norm(halved(rows, F.silu), (16,))),
        "is no activation that the kernels know",
    ),
    "a factor": (Scaled(), "aten.mul.Tensor follows the experts' last matmul"),
    "computed tables": (Halved(), "weights are computed in the forward (aten.mul.Tensor)"),
    "casts": (Cast(), "aten._to_copy"),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_does_not_fit_is_kept_with_the_reason(why: str) -> None:
    model, reason = KEPT[why]
    case = captured(model.requires_grad_(False), tokens(11, 32))
    graph, report, kept = compiled(case)
    assert len(kept) == 1 and reason in kept[0]
    assert not fused_ops(graph) and report.plans[0].summary == "local"
    assert error_on_ranks(case, [graph]) <= (6e-2 if why == "casts" else 1e-5)
    said = f"experts of 1 layer not fused: {kept[0]}"
    assert said in report.to_text() and said.split(":")[0] in str(report)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("classic_mixtral", "the experts' weights are tensors of their own, not one table"),
        ("llama4_before", "the routing weights multiply the tokens"),
    ],
)
def test_spellings_that_are_kept(name: str, reason: str) -> None:
    spelling = SPELLINGS[name]
    case = captured(spelling.build(), spelling.tokens())
    graph, _, kept = compiled(case)
    assert kept == [reason] and not fused_ops(graph)
    assert error_on_ranks(case, [graph]) <= 1e-5


def test_explain_says_it() -> None:
    model = KEPT["an unknown op"][0]
    with torch.no_grad():
        report = moe_fx.explain(model, tokens(11, 32), options={"lower": "cuda"})
        assert "experts of 1 layer not fused: aten.sin" in report.to_text()
        report = moe_fx.explain(block("qwen3_moe"), tokens(1, 13, 64), options={"lower": "cuda"})
    assert "local, fused" in report.to_text()


# -- what is read is not trusted -------------------------------------------------------------------

WRONG = {
    "another activation": Fused("halves", "relu"),
    "gate and up changed": Fused("halves_up_first", "silu"),
    "a limit that few values reach": Fused("halves", "silu", 1.0, 1.0),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_verification_sees_a_wrong_reading_and_takes_it_back(
    wrong: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    fusing = importlib.import_module("moe_fx.passes.strategies.fused")
    monkeypatch.setattr(fusing, "read_activation", lambda middle: WRONG[wrong])
    graph, report, kept = compiled(case, training=training)
    assert len(kept) == 1 and kept[0].startswith("verification: the rewrite changed the result")
    assert report.plans[0].fused is None and not fused_ops(graph)
    assert report.regions[0].verified
    assert [each.op for each in report.lowered].count("experts") == 1
    assert error_on_ranks(case, [graph]) <= 1e-5
