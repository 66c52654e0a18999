"""Micro-batches in turn: the same results, and exchanges of one under way while another works."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx
from moe_fx.testing import RankPool
from tests.dispatcher.layers import Weights, tokens_of

EXPERTS, TOP_K = 8, 2


def interleaved(rank: int, count: int) -> dict[str, Any]:
    local = EXPERTS // dist.get_world_size()
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(moe_fx.MoEDispatcherConfig(num_local_experts=local))
    whole = Weights.make(EXPERTS)
    own = whole.own(rank * local, local)
    batches = [tokens_of(10 * at + rank, 4 + at + rank, EXPERTS, TOP_K) for at in range(count)]
    for x, _, _ in batches:
        x.requires_grad_()
    events: list[str] = []

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        events.append("experts")
        return own.experts(rows, counts)

    def layer(x: Tensor, probs: Tensor, ids: Tensor) -> Generator[None, None, Tensor]:
        out = yield from d.steps(x, probs, ids, experts)
        return x + out

    with _Watch(events):
        found = moe_fx.interleave(*(layer(*each) for each in batches))
    sum(out.square().sum() for out in found).backward()  # type: ignore[union-attr]
    errors = []
    for out, (x, probs, ids) in zip(found, batches, strict=True):
        leaf = x.detach().requires_grad_()
        expected = leaf + whole.dense(leaf, probs, ids)
        expected.square().sum().backward()
        errors += [float((out - expected).abs().max())]
        assert x.grad is not None and leaf.grad is not None
        errors += [float((x.grad - leaf.grad).abs().max())]
    return {"error": max(errors), "events": events}


class _Watch(TorchDispatchMode):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {
            torch.ops.moe_fx.all_to_all.default: "start",
            torch.ops.moe_fx.wait.default: "wait",
        }
        if func in names:
            self.events.append(names[func])
        return func(*args, **(kwargs or {}))


def test_one_computes_while_the_other_s_rows_travel(ranks2: RankPool) -> None:
    for found in ranks2.run(interleaved, 2):
        assert found["error"] <= 1e-12
        assert found["events"] == [
            *("start", "start"),
            *("wait", "experts", "start"),
            *("wait", "experts", "start"),
            *("wait", "wait"),
        ]


def test_any_number_of_micro_batches(ranks2: RankPool) -> None:
    for count in (1, 3):
        for found in ranks2.run(interleaved, count):
            assert found["error"] <= 1e-12


def test_generators_of_other_lengths() -> None:
    def counting(stops: int) -> Generator[None, None, int]:
        for _ in range(stops):
            yield
        return stops

    assert moe_fx.interleave(counting(0), counting(3), counting(1)) == [0, 3, 1]
    assert moe_fx.interleave() == []
