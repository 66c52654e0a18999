"""Verify compares gradients in training: what is right in values only is declined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import Node

import moe_fx
from moe_fx import passes
from moe_fx.options import Options
from moe_fx.passes.evaluate import compare, gradients
from moe_fx.passes.evaluate.extract import extract_region
from moe_fx.passes.verify import verify
from moe_fx.report import Report
from tests.passes.graphs import block, rewritten, tokens
from tests.passes.verify.test_verify import Emit, case_of, plant
from tests.testing.layers import Layer

aten, ops = torch.ops.aten, torch.ops.moe_fx
CHANGED = "the rewrite changed the gradient of"


# -- planted bugs: right in values -----------------------------------------------------------------


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError("no derivative")


def doubled(x: Tensor) -> Tensor:
    return _Doubled.apply(x)  # type: ignore[no-any-return]


def refusing(x: Tensor) -> Tensor:
    return _Refusing.apply(x)  # type: ignore[no-any-return]


def weights_detached(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is ops.unpermute.default and args[2] is not None:
        args = (*args[:2], emit(aten.detach.default, args[2]), args[3])
    return emit(op, *args, **kwargs)


def tokens_detached(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is ops.permute.default:
        args = (emit(aten.detach.default, args[0]), *args[1:])
    return emit(op, *args, **kwargs)


def tables_detached(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    result = emit(op, *args, **kwargs)
    local_experts = op is aten.slice.Tensor and args[1] == 0
    return emit(aten.detach.default, result) if local_experts else result


def exchange_doubled(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    result = emit(op, *args, **kwargs)
    return emit(doubled, result) if op is ops.wait.default else result


BUGS: dict[Callable[..., Node], str] = {
    weights_detached: "weights",
    tokens_detached: "tokens",
    tables_detached: "experts_",  # of the module that holds the parameter
    exchange_doubled: "experts_",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_gradients_only_is_caught_in_training(
    monkeypatch: pytest.MonkeyPatch, bug: Callable[..., Node], dtype: torch.dtype
) -> None:
    case = case_of(dtype=dtype)
    plant(monkeypatch, bug)
    assert rewritten(case.module, 2)[0] is not None, "values are right"
    graph, report = rewritten(case.module, 2, training=True)
    assert graph is None
    (declined,) = report.declined
    assert declined.reason.startswith(f"{CHANGED} {BUGS[bug]}")
    assert "random routing: relative difference" in declined.reason
    assert declined.source


def test_the_gradient_of_a_table_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, tables_detached)
    _, report = rewritten(case_of().module, 2, training=True)
    assert report.declined[0].reason.endswith("summed over 2 ranks")


def test_a_wrong_backward_of_a_dialect_op_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.unpermute_grad

    def no_gradient_of_weights(*args: Any) -> tuple[Tensor, Tensor]:
        rows, weights = real(*args)
        return rows, torch.zeros_like(weights)

    monkeypatch.setattr(ops, "unpermute_grad", no_gradient_of_weights)
    graph, report = rewritten(case_of().module, 2, training=True)
    assert graph is None
    assert report.declined[0].reason.startswith(f"{CHANGED} weights")


def test_a_rewrite_without_derivative_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
        result = emit(op, *args, **kwargs)
        return emit(refusing, result) if op is ops.wait.default else result

    plant(monkeypatch, refuses)
    graph, report = rewritten(case_of().module, 2, training=True)
    assert graph is None
    reason = report.declined[0].reason
    assert reason.startswith("the rewrite cannot be differentiated with random routing: ")
    assert reason.endswith("no derivative")


def test_a_layer_without_derivative_is_declined() -> None:
    context = passes.Context(Options(), Report())
    passes.run(case_of().module, context, passes.for_ranks(2, passes=passes.ANALYSIS))
    (plan,) = context.plans
    alone, region = extract_region(context.regions[0])
    (silu,) = alone.module.graph.find_nodes(op="call_function", target=aten.silu.default)
    silu.target = refusing
    assert isinstance(verify.difference(alone, region, plan), verify.Verified)
    reason = verify.difference(alone, region, plan, frozenset())
    assert isinstance(reason, str)
    assert reason.startswith("the layer cannot be differentiated with random routing: ")


# -- parts under no_grad ---------------------------------------------------------------------------


class FrozenExperts(Layer):
    """Tokens flow through the experts without gradients; those of the weights remain."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.select(self.gate(x).softmax(-1))
        with torch.no_grad():
            up, down = self.experts["up"][ids.flatten()], self.experts["down"][ids.flatten()]
            rows = x.repeat_interleave(2, 0).unsqueeze(1)
            out = torch.bmm(torch.bmm(rows, up).relu(), down).squeeze(1)
        return (out * weights.view(-1, 1)).view(x.shape[0], 2, -1).sum(1)


class AllFrozen(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = super().forward(x)
        return out + x


def test_a_layer_partly_under_no_grad_is_declined() -> None:
    model, x = FrozenExperts(), tokens(12, 32)
    report = moe_fx.explain(model, x, ranks=2)
    assert report.regions == []
    assert report.declined[0].reason.startswith(CHANGED)
    with torch.no_grad():
        assert moe_fx.explain(model, x, ranks=2).regions[0].verified


def test_a_layer_all_under_no_grad_has_no_gradients_to_compare() -> None:
    (region,) = moe_fx.explain(AllFrozen(), tokens(12, 32), ranks=2).regions
    assert region.verification is not None
    assert region.verification.gradients == ()


# -- what is compared when -------------------------------------------------------------------------


def test_in_inference_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(torch.autograd, "grad", must_not_run)
    monkeypatch.setattr(verify, "choose_leaves", must_not_run)
    model = block("qwen3_moe")
    x = tokens(1, 12, 64)
    with torch.no_grad():
        reports = [moe_fx.explain(model, x, ranks=2), compiled(model, x)]
    reports.append(moe_fx.explain(model.requires_grad_(False), x, ranks=2))
    for report in reports:
        (region,) = report.regions
        assert region.verification is not None
        assert region.verification.gradients == ()
        assert region.verification.max_gradient_difference is None
        assert "gradients" not in report.to_html()


def compiled(model: nn.Module, x: Tensor) -> Report:
    report = Report()
    torch._dynamo.reset()
    torch.compile(
        model, backend="moe_fx", options={"base": "aot_eager", "on_report": report.extend}
    )(x)
    torch._dynamo.reset()
    return report


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_block_in_training_is_verified_with_gradients(
    family: str, form: str, dtype: torch.dtype
) -> None:
    model, x = block(family, form, dtype), tokens(1, 12, 64, dtype=dtype)
    for report in (moe_fx.explain(model, x, ranks=4), compiled(model, x)):
        assert report.declined == []
        (region,) = report.regions
        seen = region.verification
        assert seen is not None
        assert {"tokens", "weights"} < set(seen.gradients)
        assert len(seen.gradients) == (4 if family == "qwen3_moe" else 6)
        assert seen.max_gradient_difference is not None
        assert 0 <= seen.max_gradient_difference < seen.tolerance
        assert "gradients of" in report.to_html()


def test_tables_too_large_for_dense_gradients_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "_BUDGET_BYTES", 1 << 16)
    (region,) = moe_fx.explain(block("qwen3_moe"), tokens(1, 12, 64), ranks=2).regions
    assert region.verification is not None
    assert set(region.verification.gradients) == {"tokens", "weights"}


def test_a_gradient_that_is_all_rounding_is_measured_against_the_others() -> None:
    large, none = torch.tensor([1.0, -2.0]), torch.zeros(2)
    noise = torch.tensor([1e-9, 0.0])
    assert compare.relative_errors([large, none], [large, noise])[1] < 1e-6
    assert compare.relative_errors([large, none], [large, large])[1] > 1e2
    assert compare.relative_errors([large], [large * float("nan")]) == [float("inf")]
