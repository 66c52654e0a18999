"""Chunked exchanges on two real ranks: the same numbers, their order in emitted code, the plan."""

from __future__ import annotations

import functools
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import moe_fx
from moe_fx.cost import decide
from moe_fx.cost.link import Link
from moe_fx.errors import RanksDiffer
from moe_fx.passes.plan import planner
from moe_fx.plan import ExchangePlan
from moe_fx.testing import RankPool
from tests.passes.graphs import block, relative_error, tokens

EXACT = 1e-6
SLOW = Link(latency=1e-3, alone=1e-6, two=6e-7, busy=6e-7)
FAST = Link(latency=1e-7, alone=1e-13, two=1e-13, busy=1e-13)


def results(
    rank: int,
    family: str,
    overlap: int | str,
    base: str,
    training: bool = False,
    count: int = 9,
) -> list[Tensor]:
    """The block's output, and in training the gradients of tokens and of all parameters."""
    torch._dynamo.reset()
    module = block(family).requires_grad_(training)
    values = tokens(1, count + 4 * rank, 64, seed=rank).requires_grad_(training)
    options = {"ep_group": dist.group.WORLD, "overlap": overlap, "base": base}
    compiled = torch.compile(module, backend="moe_fx", dynamic=True, options=options)
    with torch.set_grad_enabled(training):
        out = compiled(values)
        out = out if isinstance(out, Tensor) else out[0]
        if not training:
            return [out]
        leaves = [values, *module.parameters()]
        grads = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
    return [out.detach(), *grads]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_chunks_by_expert_give_the_same_bits(ranks2: RankPool, family: str) -> None:
    whole = ranks2.run(results, family, 1, "eager")
    for chunks in (2, 4, 8):
        for (found,), (expected,) in zip(
            ranks2.run(results, family, chunks, "eager"), whole, strict=True
        ):
            assert torch.equal(found, expected)


def test_experts_cut_in_two_give_the_same_but_for_rounding(ranks2: RankPool) -> None:
    whole = ranks2.run(results, "qwen3_moe", 1, "eager", False, 700)
    for chunks in (2, 8):
        for (found,), (expected,) in zip(
            ranks2.run(results, "qwen3_moe", chunks, "eager", False, 700), whole, strict=True
        ):
            assert relative_error(expected, found) <= EXACT


@pytest.mark.parametrize("chunks", [4, 8])
def test_gradients_of_chunks_are_those_of_the_whole(ranks2: RankPool, chunks: int) -> None:
    whole = ranks2.run(results, "deepseek_v3", 1, "aot_eager", True)
    found = ranks2.run(results, "deepseek_v3", chunks, "aot_eager", True)
    for one, other in zip(whole, found, strict=True):
        for expected, value in zip(one, other, strict=True):
            assert relative_error(expected, value) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_of_experts_cut_in_two_are_those_of_the_whole(
    ranks2: RankPool, family: str
) -> None:
    """By Inductor, in whose backward graph each expert has one gradient."""
    whole = ranks2.run(results, family, 1, "inductor", True, 700, timeout=400)
    found = ranks2.run(results, family, 4, "inductor", True, 700, timeout=400)
    for one, other in zip(whole, found, strict=True):
        for expected, value in zip(one, other, strict=True):
            assert relative_error(expected, value) <= EXACT


def strides(rank: int, overlap: int | str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each experts' parameter, as autograd gets its gradient, and its own."""
    torch._dynamo.reset()
    module = block("qwen3_moe")
    moe_fx.shard_experts(module, dist.group.WORLD)
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def note(own: tuple[int, ...], gradient: Tensor) -> None:
        found.append((gradient.stride(), own))

    for name, parameter in module.named_parameters():
        if "experts" in name:
            parameter.register_hook(functools.partial(note, parameter.stride()))
    options = {"overlap": overlap}
    compiled = torch.compile(module, backend="moe_fx", options=options)
    out = compiled(tokens(1, 16, 64, seed=rank))
    (out if isinstance(out, Tensor) else out[0]).sum().backward()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["off", 4])
def test_gradients_come_in_their_parameters_layout(ranks2: RankPool, overlap: int | str) -> None:
    """Autograd would copy others: a seventh of a layer's step."""
    for found in ranks2.run(strides, overlap, timeout=400):
        assert len(found) == 2
        for gradient, own in found:
            assert gradient == own


def messages(rank: int, counts: tuple[int, ...]) -> list[tuple[int, float]]:
    """Of one graph, for each number of tokens: exchanges, and the difference from eager."""
    torch._dynamo.reset()
    module = block("qwen3_moe")
    options = {"ep_group": dist.group.WORLD, "overlap": 8, "base": "eager"}
    reports: list[moe_fx.Report] = []
    options["on_report"] = reports.append
    compiled = torch.compile(module, backend="moe_fx", dynamic=True, options=options)
    found = []
    with torch.no_grad():
        for count in counts:
            values = tokens(1, count, 64, seed=rank)
            with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent:
                out = compiled(values)
            found.append((sent.call_count, relative_error(module(values), out)))
    assert len(reports) == 1
    return found


def test_a_graph_for_any_number_of_tokens_sends_few_in_one_piece(ranks2: RankPool) -> None:
    """Counts, and there and back of ten pieces or of one."""
    for (many, error), (few, error_of_few) in ranks2.run(messages, (700, 3)):
        assert (many, few) == (1 + 2 * 10, 1 + 2)
        assert max(error, error_of_few) <= 1e-5


# -- the order -------------------------------------------------------------------------------------

LANDMARKS = {
    "moe_fx.all_to_all.default(": "start",
    "moe_fx.wait.default(": "wait",
    "moe_fx.wait_after.default(": "wait",
    "moe_fx.grouped_mm.default(": "experts",
    "moe_fx.grouped_mm_grad_weight.default(": "gradients",
    "moe_fx.grouped_mm_grad_weight_sum.default(": "gradients",
    "extern_kernels.mm(": "product",
}


def landmarks(code: str) -> list[str]:
    """What the emitted code calls, in order."""
    calls = []
    for line in code[code.index("def call(") :].splitlines():
        if not re.match(r"\s*(buf\d+ = torch|extern_kernels)", line):
            continue
        calls += [name for text, name in LANDMARKS.items() if text in line]
    return calls


def emitted(rank: int, family: str, training: bool) -> list[list[str]]:
    """Of each compiled graph, under a link so slow that all that can be is done meanwhile."""
    torch._dynamo.reset()
    module = block(family).requires_grad_(training)
    values = tokens(1, 16, 64, seed=rank).requires_grad_(training)
    options = {"ep_group": dist.group.WORLD, "overlap": 4}
    compiled = torch.compile(module, backend="moe_fx", options=options)

    def step() -> Tensor:
        out = compiled(values)
        if training:
            out.sum().backward()
        return out

    slow = mock.patch("moe_fx.passes.overlap.node_costs.known", lambda group, device: SLOW)
    uncached = torch._inductor.config.patch(fx_graph_cache=False)
    with slow, uncached, torch.set_grad_enabled(training):
        _, codes = run_and_get_code(step)
    return [landmarks(code) for code in codes]


def pipeline(pieces: int) -> list[str]:
    there, back = ["start"] * pieces, ["wait"] * pieces
    return there + ["wait", "experts", "experts", "start"] * pieces + back


def test_inductor_emits_the_pipeline(ranks2: RankPool) -> None:
    """Of four chunks, the outer ones in halves."""
    for (calls,) in ranks2.run(emitted, "qwen3_moe", False):
        assert [call for call in calls if call != "product"] == pipeline(6)


def test_shared_experts_are_emitted_where_they_fill_the_waiting(ranks2: RankPool) -> None:
    for (calls,) in ranks2.run(emitted, "deepseek_v3", False):
        first_wait = calls.index("wait")
        assert calls[:first_wait].count("product") == 4  # the router and the shared expert
        assert [call for call in calls if call != "product"] == pipeline(6)


@pytest.mark.slow
def test_the_backward_is_a_pipeline_too(ranks2: RankPool) -> None:
    """Gradients of weights, which lead to no exchange, are computed while the last ones travel."""
    for forward, backward in ranks2.run(emitted, "qwen3_moe", True, timeout=400):
        assert [call for call in forward if call != "product"] == pipeline(6)
        calls = [call for call in backward if call != "product"]
        there, back = ["start"] * 6, ["wait"] * 6
        each = ["wait", "experts", "experts", "start"] * 6
        assert calls == [*there, *each, "gradients", "gradients", *back]


# -- the plan --------------------------------------------------------------------------------------


def planned(rank: int, link: Link) -> ExchangePlan:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    group = dist.new_group()
    options = {"ep_group": group, "base": "eager", "on_report": reports.append}
    compiled = torch.compile(block("qwen3_moe"), backend="moe_fx", options=options)
    with (
        mock.patch.object(planner, "link_of", lambda *_: link),
        torch.no_grad(),
    ):
        compiled(tokens(1, 64 + rank, 64))
    return reports[0].plans[0]


def test_a_slow_link_is_worth_chunks_and_a_fast_one_is_not(ranks2: RankPool) -> None:
    slow, fast = (ranks2.run(planned, link) for link in (SLOW, FAST))
    assert {plan.chunks for plan in fast} == {1}
    assert slow[0].chunks > 1
    for first, second in (slow, fast):
        assert first.predicted == second.predicted
        assert first.chunks == second.chunks
    assert slow[0].predicted.seconds < slow[0].predicted.unoverlapped


def decided(rank: int, late: bool) -> str:
    group = dist.new_group()
    if late and rank == 0:
        return ""
    try:
        return str(decide.decide(group, "a layer", lambda: {"by": rank}, timeout=0.5))
    except RanksDiffer as error:
        return str(error)


def test_the_first_rank_decides_for_all(ranks2: RankPool) -> None:
    assert ranks2.run(decided, False) == ["{'by': 0}"] * 2


def test_a_first_rank_that_never_decides_is_an_error_and_no_hang(ranks2: RankPool) -> None:
    _, message = ranks2.run(decided, True)
    assert "waited 0.5 s for rank(s) [0]" in message
