"""Verify catches bugs planted in the rewrite, says what it saw, and leaves the graph as it came."""

from __future__ import annotations

import importlib
import operator
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.fx import Node

from moe_fx import passes
from moe_fx.options import Options
from moe_fx.passes.evaluate.extract import extract_region
from moe_fx.passes.strategies import emitter as emitting
from moe_fx.passes.verify import verify
from moe_fx.passes.verify.rank_values import RankValues
from moe_fx.plan import ExchangePlan
from moe_fx.report import Report
from tests.models import build, token_ids
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    relative_error,
    rewritten,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)

aten, ops = torch.ops.aten, torch.ops.moe_fx
WORLDS = (2, 4)
DTYPES = (torch.float32, torch.bfloat16)
CHANGED = "the rewrite changed the result with"
NOT_VERIFIED = "could not be verified with"


# -- planted bugs: what the emitter is made to emit ------------------------------------------------

Emit = Callable[..., Node]
Bug = Callable[[Any, Emit, Any, tuple[Any, ...], dict[str, Any]], Node]
"""(emitter, the real ``call``, op, args, kwargs) -> node"""


def plant(patch: pytest.MonkeyPatch, bug: Bug) -> None:
    """Every op the rewrite emits goes through ``bug``."""
    real = emitting.Emitter.call

    def call(self: Any, op: Any, *args: Any, **kwargs: Any) -> Node:
        return bug(self, lambda *a, **k: real(self, *a, **k), op, args, kwargs)

    patch.setattr(emitting.Emitter, "call", call)


def experts_of_the_next_rank(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is aten.slice.Tensor and args[1] == 0:
        table, _, first, last = args
        shift = emitter.plan.local_experts * (1 if emitter.plan.rank % 2 == 0 else -1)
        args = (table, 0, first + shift, last + shift)
    return emit(op, *args, **kwargs)


def local_experts_reversed(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    result = emit(op, *args, **kwargs)
    sliced = op is aten.slice.Tensor and args[1] == 0
    return emit(aten.flip.default, result, [0]) if sliced else result


def regroup_skipped(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    return emit(_as_they_came if op is ops.regroup.default else op, *args, **kwargs)


def _as_they_came(rows: Tensor, recv_counts: Tensor) -> tuple[Tensor, Tensor]:
    return rows, torch.arange(rows.shape[0], dtype=torch.int32)


def weights_dropped(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op in (ops.unpermute.default, ops.unpermute_chunks.default):
        args = (*args[:2], None, *args[3:])
    return emit(op, *args, **kwargs)


def offsets_off_by_one(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    result = emit(op, *args, **kwargs)
    if op is not aten.cumsum.default:
        return result
    return emit(aten.clamp.default, emit(aten.sub.Tensor, result, 1), 0)


def counts_for_offsets(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is aten.cumsum.default:
        return emit(aten._to_copy.default, args[0], **kwargs)
    return emit(op, *args, **kwargs)


def send_and_receive_counts_swapped(
    emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any
) -> Node:
    if op is ops.all_to_all.default:
        rows, send, recv, group = args
        args = (rows, recv, send, group)
    return emit(op, *args, **kwargs)


def rows_not_brought_back(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    """The rows of one rank's experts return in the experts' order, not in that of the sender."""
    if op is ops.unpermute.default and args[2] is None:
        return emit(aten.clone.default, args[0])
    return emit(op, *args, **kwargs)


def only_some_ranks_exchange(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    result = emit(op, *args, **kwargs)
    if op is ops.exchange_counts.default and emitter.plan.rank == 1:
        return emit(
            op, emit(aten.reshape.default, result, [-1]), *args[1:]
        )  # on real ranks: a hang
    return result


BUGS = {
    experts_of_the_next_rank: CHANGED,
    local_experts_reversed: CHANGED,
    regroup_skipped: CHANGED,
    weights_dropped: CHANGED,
    offsets_off_by_one: CHANGED,
    counts_for_offsets: CHANGED,
    send_and_receive_counts_swapped: NOT_VERIFIED,
    rows_not_brought_back: CHANGED,
    only_some_ranks_exchange: f"{NOT_VERIFIED} random routing: RanksDisagree",
}


def case_of(family: str = "qwen3_moe", form: str = "grouped_mm", **kwargs: Any) -> Captured:
    return captured(block(family, form, **kwargs), tokens(1, 12, 64, **_dtype(kwargs)))


def _dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def case(request: pytest.FixtureRequest) -> Captured:
    return case_of(dtype=request.param)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_caught_and_the_graph_left_as_it_came(
    monkeypatch: pytest.MonkeyPatch, case: Captured, bug: Bug, world: int
) -> None:
    before = case.module.code
    plant(monkeypatch, bug)
    graph, report = rewritten(case.module, world)
    assert graph is None
    assert report.regions == report.plans == []
    (declined,) = report.declined
    assert declined.reason.startswith(BUGS[bug])
    assert declined.node in {node.name for node in case.module.graph.nodes}
    assert declined.source
    assert declined.nearest_form == "grouped_mm"
    assert case.module.code == before


def weights_of_the_next_slice(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is operator.getitem and args[0].target is aten.split.Tensor:
        args = (args[0], (args[1] + 1) % emitter.plan.expert_slices)
    return emit(op, *args, **kwargs)


def sorted_by_rank_first(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    return (
        emit(aten.clone.default, args[0])
        if op is ops.chunk_keys.default
        else emit(op, *args, **kwargs)
    )


def chunks_come_back_in_another_order(
    emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any
) -> Node:
    if op is ops.unpermute_chunks.default:
        args = (args[0][::-1], *args[1:])
    return emit(op, *args, **kwargs)


CHUNK_BUGS = (
    weights_of_the_next_slice,
    sorted_by_rank_first,
    chunks_come_back_in_another_order,
    weights_dropped,
    regroup_skipped,
)


def cut_for_another_rank(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is ops.cut_rows.default:
        args = (args[0], 1 - args[1], *args[2:])
    return emit(op, *args, **kwargs)


def ranks_cut_differently(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is ops.cut_rows.default and emitter.plan.rank == 1:
        args = (*args[:3], 4)
    return emit(op, *args, **kwargs)


def sorted_by_expert_only(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    op = ops.permute_chunks.default if op is ops.permute_cut.default else op
    return emit(op, *args, **kwargs)


def counts_of_the_next_piece(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is aten.select.int and args[0].target is operator.getitem and args[0].args[1] == 1:
        args = (args[0], 0, (args[2] + 1) % 4)
    return emit(op, *args, **kwargs)


CUT_BUGS = (
    cut_for_another_rank,
    ranks_cut_differently,
    sorted_by_expert_only,
    counts_of_the_next_piece,
    chunks_come_back_in_another_order,
    weights_dropped,
    regroup_skipped,
)


BY_EXPERT: dict[str, Any] = {"overlap": 2, "lower": "npu"}
BY_ROWS: dict[str, Any] = {"overlap": 2}


@pytest.mark.parametrize(
    ("chunks", "bug"),
    [
        pytest.param(chunks, bug, id=f"{kind}-{bug.__name__}")
        for kind, chunks, bugs in (
            ("by_expert", BY_EXPERT, CHUNK_BUGS),
            ("by_rows", BY_ROWS, CUT_BUGS),
        )
        for bug in bugs
    ],
)
def test_a_bug_in_chunks_is_caught(
    monkeypatch: pytest.MonkeyPatch, case: Captured, chunks: dict[str, Any], bug: Bug
) -> None:
    _, report = rewritten(case.module, 2, **chunks)
    plan = report.plans[0]
    assert (plan.expert_slices, plan.row_slices) == ((1, 2) if chunks is BY_ROWS else (2, 1))
    plant(monkeypatch, bug)
    graph, report = rewritten(case.module, 2, **chunks)
    assert graph is None
    assert report.declined[0].reason.startswith((CHANGED, NOT_VERIFIED))


def pairs_of_the_next_expert(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    if op is ops.permute_local.default:
        args = (*args[:2], args[2] + 1, *args[3:])
    return emit(op, *args, **kwargs)


def owners_of_twice_as_many(emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any) -> Node:
    """Of experts, where tokens go; the first rank has all of them then."""
    if op in (ops.direct_dispatch.default, ops.direct_experts.default):
        args = (*args[:-2], 2 * args[-2], args[-1])
    return emit(op, *args, **kwargs)


DIRECT_BUGS = (
    experts_of_the_next_rank,
    local_experts_reversed,
    weights_dropped,
    pairs_of_the_next_expert,
    owners_of_twice_as_many,
)


@pytest.mark.parametrize("bug", DIRECT_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_direct_is_caught(
    monkeypatch: pytest.MonkeyPatch, case: Captured, bug: Bug
) -> None:
    plant(monkeypatch, bug)
    graph, report = rewritten(case.module, 2, strategy="direct")
    assert graph is None
    assert report.declined[0].reason.startswith((CHANGED, NOT_VERIFIED))


def test_a_bug_in_direct_experts_as_one_op_is_caught(
    monkeypatch: pytest.MonkeyPatch, case: Captured
) -> None:
    graph, report = rewritten(case.module, 2, strategy="direct", lower="cuda")
    assert graph is not None and report.plans[0].fused is not None
    plant(monkeypatch, owners_of_twice_as_many)
    graph, report = rewritten(case.module, 2, strategy="direct", lower="cuda")
    assert graph is None
    (kept,) = [each for each in report.lowered if each.op == "experts"]
    assert kept.to == () and kept.kept.startswith("verification: ")


@pytest.mark.parametrize("bug", [offsets_off_by_one, weights_dropped], ids=lambda b: b.__name__)
def test_a_bug_on_one_device_is_caught(
    monkeypatch: pytest.MonkeyPatch, case: Captured, bug: Bug
) -> None:
    plant(monkeypatch, bug)
    graph, report = rewritten(case.module)
    assert graph is None
    assert "rank 0 of 1" in report.declined[0].reason


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    "bug", [experts_of_the_next_rank, regroup_skipped], ids=lambda b: b.__name__
)
def test_a_bug_is_caught_where_weights_are_gathered_by_row(
    monkeypatch: pytest.MonkeyPatch, family: str, bug: Bug
) -> None:
    case = case_of(family, "batched_mm")
    plant(monkeypatch, bug)
    graph, report = rewritten(case.module, 2)
    assert graph is None
    assert report.declined[0].reason.startswith(CHANGED)
    assert report.declined[0].nearest_form == "batched_mm"


def test_the_reason_names_the_routing_the_difference_and_the_rank(
    monkeypatch: pytest.MonkeyPatch, case: Captured
) -> None:
    plant(monkeypatch, experts_of_the_next_rank)
    reason = rewritten(case.module, 2)[1].declined[0].reason
    assert "random routing" in reason
    assert "relative difference" in reason
    assert reason.endswith("of 2")


def test_a_bug_that_only_empty_experts_show_is_caught(
    monkeypatch: pytest.MonkeyPatch, case: Captured
) -> None:
    def last_expert_takes_the_rest(
        emitter: Any, emit: Emit, op: Any, args: Any, kwargs: Any
    ) -> Node:
        """Right as long as the first expert has rows."""
        if op is ops.expert_counts.default:
            return emit(_first_expert_has_one, *args)
        return emit(op, *args, **kwargs)

    plant(monkeypatch, last_expert_takes_the_rest)
    graph, report = rewritten(case.module)
    assert graph is None
    assert "only the last experts" in report.declined[0].reason


def _first_expert_has_one(ids: Tensor, num_experts: int) -> Tensor:
    counts = ops.expert_counts(ids, num_experts)
    if counts[:-2].sum() == 0:
        counts[0], counts[num_experts - 1] = 1, counts[num_experts - 1] - 1
    return counts


@pytest.mark.parametrize("distinct", [True, False])
def test_an_expert_comes_up_twice_only_where_the_router_may_do_that(
    case: Captured, distinct: bool
) -> None:
    context = passes.Context(Options(), Report())
    passes.run(case.module, context, passes.for_ranks(1, passes=passes.ANALYSIS))
    (region,) = context.regions
    region = replace(region, parts=replace(region.parts, distinct=distinct))
    alone, extracted = extract_region(region)
    values = RankValues(alone, extracted, ExchangePlan("local", 8, 8), num_tokens=9)
    at = [alone.copies[node] for node in alone.inputs].index(extracted.parts.ids)
    drawn = torch.cat([values.inputs(routing)[0][at] for routing in values.routings])
    assert drawn.shape[1] == region.top_k
    assert set(drawn.unique().tolist()) <= set(range(region.num_experts))
    ids = drawn.sort(1).values
    assert bool((ids[:, 1:] == ids[:, :-1]).any()) != distinct


# -- the option ------------------------------------------------------------------------------------


def test_off_skips_and_says_so(monkeypatch: pytest.MonkeyPatch, case: Captured) -> None:
    monkeypatch.setattr(verify, "difference", _must_not_run)
    graph, report = rewritten(case.module, 2, verify="off")
    assert graph is not None
    assert [region.verified for region in report.regions] == [False]


def _must_not_run(*args: Any) -> str:
    raise AssertionError("verification ran")


@pytest.mark.parametrize("mode", ["compile", "always"])
def test_what_agrees_is_marked_verified(case: Captured, mode: str) -> None:
    for world in (1, *WORLDS):
        graph, report = rewritten(case.module, world, verify=mode)
        assert graph is not None
        assert [region.verified for region in report.regions] == [True]
        assert report.declined == []


def two_equal_layers() -> Captured:
    model, config = build("qwen3_moe")
    return captured(
        lambda ids: model(input_ids=ids, use_cache=False).logits, token_ids(config, 1, 8)
    )


def test_always_verifies_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count_differences(monkeypatch)
    _, report = rewritten(two_equal_layers().module, 2, verify="always")
    assert len(report.regions) == len(counted) == 2


def count_differences(monkeypatch: pytest.MonkeyPatch, result: str | None = None) -> list[Any]:
    real, calls = verify.difference, []

    def difference(*args: Any) -> str:
        calls.append(args)
        return real(*args) if result is None else result

    monkeypatch.setattr(verify, "difference", difference)
    return calls


def test_one_of_two_layers_is_declined_and_the_other_rewritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = two_equal_layers()
    real, seen = verify.difference, []

    def difference(*args: Any) -> str:
        seen.append(args)
        return "planted" if len(seen) == 1 else real(*args)

    monkeypatch.setattr(verify, "difference", difference)
    graphs, report = rewritten_on_ranks(case.module, 1, verify="always")
    assert graphs is not None
    assert [declined.reason for declined in report.declined] == ["planted"]
    assert len(report.regions) == len(report.plans) == 1
    inputs = [case.inputs]
    with torch.no_grad():
        expected = [case.module(*case.inputs)]
    assert relative_error(expected, run_ranks(graphs, inputs)) <= 1e-5


# -- sizes of real models --------------------------------------------------------------------------


def large_block(form: str, dtype: torch.dtype) -> nn.Module:
    """0.8 GB of weights in bf16, allocated but never written, so not in memory."""
    modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = hf.Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_experts=64,
        num_experts_per_tok=8,
        experts_implementation=form,
    )
    with torch.device("meta"):
        module = modeling.Qwen3MoeSparseMoeBlock(config)
    return module.to(dtype).to_empty(device="cpu").eval()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_large_weights_are_verified_in_bounded_memory(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = captured(
        large_block(form, torch.bfloat16),
        torch.zeros(1, 16, 2048, dtype=torch.bfloat16),
        execute=False,
    )
    before, start = peak_bytes(), time.perf_counter()
    graph, report = rewritten(case.module, 4)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n64 experts of 2048 x 1024, {form}, 4 ranks: verified in {seconds:.1f} s", end=" ")
    assert graph is not None
    assert report.regions[0].verified
    assert peak_bytes() - before < 1.5 * 2**30


def test_large_weights_tell_experts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    case = captured(
        large_block("grouped_mm", torch.bfloat16),
        torch.zeros(1, 16, 2048, dtype=torch.bfloat16),
        execute=False,
    )
    plant(monkeypatch, experts_of_the_next_rank)
    graph, report = rewritten(case.module, 2)
    assert graph is None
    assert report.declined[0].reason.startswith(CHANGED)
