"""Rows in buffers of fixed size: the same sums as ``permute`` and ``unpermute`` make, by whatever
way the rows go; what finds no slot; gradients; opcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_fx.ops  # noqa: F401  (registers the ops)
from moe_fx.ops.padded import slots

ops = torch.ops.moe_fx
property_test = settings(max_examples=60, deadline=None)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """(ids [W, T, K] of every rank, local experts, ranks, slices); an expert may come twice."""
    world, num_local, slices = (draw(st.integers(1, 3)) for _ in range(3))
    num_tokens, top_k = draw(st.integers(0, 7)), draw(st.integers(1, 3))
    size = world * num_tokens * top_k
    flat = draw(st.lists(st.integers(0, world * num_local - 1), min_size=size, max_size=size))
    return torch.tensor(flat, dtype=torch.int64).view(world, -1, top_k), num_local, world, slices


def scaled(rows: Tensor, counts: Tensor, first: int) -> Tensor:
    behind = torch.arange(len(rows)) >= counts.sum()
    factor = 1 + first + ops.row_experts(counts, len(rows))
    return (rows * factor.unsqueeze(1)).masked_fill(behind.unsqueeze(1), float("nan"))


def expected(tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Expert ``e`` multiplies by ``e + 1``."""
    return tokens * (weights * (ids + 1)).sum(-1, keepdim=True)


def padded(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_local: int,
    slices: int,
    factor: float | None = None,
    drop: bool = False,
) -> Tensor:
    """All ranks ``[W, T, H]`` by ``permute_padded``, the exchange done by slicing."""
    world, _, top_k = ids.shape
    sent = []
    for rank in range(world):
        keys = ops.chunk_keys(ids[rank], world * num_local, world, 1, slices)
        sent.append(
            ops.permute_padded(tokens[rank], keys, num_local, world, slices, top_k, factor, drop)
        )
    back: list[list[Tensor]] = [[] for _ in range(world)]
    for at in range(slices):
        parts = [
            rows[at].chunk(world) if len(rows[at]) else [rows[at]] * world for rows, *_ in sent
        ]
        done = []
        for owner in range(world):
            arrived = torch.cat([parts[source][owner] for source in range(world)])
            counts = torch.stack([c.view(slices, world, num_local)[at, owner] for _, _, c in sent])
            rows, row_map = ops.regroup_padded(arrived, counts)
            result = scaled(rows, counts.sum(0), owner * num_local)
            result = ops.unpermute(result, row_map, None, list(result.shape))
            done.append(result.chunk(world) if len(result) else [result] * world)
        for source in range(world):
            back[source].append(torch.cat([done[owner][source] for owner in range(world)]))
    return torch.stack(
        [
            ops.unpermute(
                torch.cat(back[rank]), sent[rank][1], weights[rank], list(tokens[rank].shape), True
            )
            for rank in range(world)
        ]
    )


def gathered(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_local: int,
    slices: int,
    factor: float | None = None,
    drop: bool = False,
) -> Tensor:
    """All ranks by ``permute_local``."""
    world, _, top_k = ids.shape
    every = [ops.rank_slices(t.flatten(0, 1), world, slices) for t in (tokens, ids, weights)]
    summed = []
    for some, some_ids, some_weights in zip(*every, strict=True):
        total = torch.zeros_like(some)
        for owner in range(world):
            first = owner * num_local
            rows, row_map, counts = ops.permute_local(
                some, some_ids, first, num_local, world, top_k, factor, drop
            )
            done = scaled(rows, counts, first)
            total = total + ops.unpermute(done, row_map, some_weights, list(some.shape), True)
        summed.append(
            total.view(world, -1, tokens.shape[-1]) if len(total) else total.view(world, 0, 5)
        )
    return torch.cat(summed, 1)


WAYS = pytest.mark.parametrize("way", [padded, gathered], ids=["padded", "gathered"])


@WAYS
@given(routings())
@property_test
def test_tokens_and_gradients_are_those_of_every_pair(
    way: object, layout: tuple[Tensor, int, int, int]
) -> None:
    ids, num_local, world, slices = layout
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(world, ids.shape[1], 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
    leaves = [t.requires_grad_() for t in (tokens, weights)]
    wanted = expected(tokens, ids, weights)
    found = way(tokens, ids, weights, num_local, slices)  # type: ignore[operator]
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    for got, want in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@WAYS
@given(routings(), st.floats(0.1, 1.5))
@property_test
def test_pairs_without_a_slot_are_those_of_the_last_tokens_and_add_nothing(
    way: object, layout: tuple[Tensor, int, int, int], factor: float
) -> None:
    ids, num_local, world, _ = layout
    num_tokens, top_k = ids.shape[1:]
    tokens = torch.randn(world, num_tokens, 5, dtype=torch.float64)
    weights = torch.rand(ids.shape, dtype=torch.float64)
    pool = 1 if way is padded else world
    capacity = slots(pool * num_tokens, top_k, world, top_k, factor)
    left = {
        (source, owner): capacity
        for source in range(world if pool == 1 else 1)
        for owner in range(world)
    }
    kept = torch.zeros(ids.shape, dtype=torch.bool)
    for token in range(num_tokens):
        for slot in range(top_k):
            for rank in range(world):
                place = (rank if pool == 1 else 0, int(ids[rank, token, slot]) // num_local)
                kept[rank, token, slot] = left[place] > 0
                left[place] -= 1
    found = way(tokens, ids, weights, num_local, 1, factor, True)  # type: ignore[operator]
    torch.testing.assert_close(found, expected(tokens, ids, weights * kept))
    if not kept.all():
        with pytest.raises(RuntimeError, match="capacity_factor"):
            way(tokens, ids, weights, num_local, 1, factor)  # type: ignore[operator]


def test_slots() -> None:
    assert slots(10, 4, 2, 4, None) == 40
    assert slots(10, 4, 2, 3, None) == 30  # three local experts, each once for a token
    assert slots(10, 4, 2, 4, 1.0) == 20
    assert slots(10, 4, 2, 4, 1.26) == 26  # 25.2, rounded up
    assert slots(10, 4, 2, 3, 8.0) == 30  # never more than can come


def test_opcheck() -> None:
    tokens = torch.randn(6, 5, requires_grad=True)
    ids = torch.randint(4, (6, 2))
    keys = ops.chunk_keys(ids, 4, 2, 1, 2)
    for arguments in ((2, 2, 2, 2, None, False), (2, 2, 2, 2, 1.5, True)):
        opcheck(ops.permute_padded.default, (tokens, keys, *arguments))
    opcheck(ops.permute_local.default, (tokens, ids, 2, 2, 2, 2, 0.5, True))
    opcheck(ops.rank_slices.default, (tokens, 2, 2))
    opcheck(ops.regroup_padded.default, (tokens, torch.tensor([[1, 1], [0, 2]])))
    opcheck(ops.row_experts.default, (torch.tensor([1, 0, 3]), 6))
    rows = torch.randn(3, 5, requires_grad=True)
    weights = torch.rand(6, 2, requires_grad=True)
    row_map = torch.randperm(12, dtype=torch.int32)
    opcheck(ops.unpermute.default, (rows, row_map, weights, [6, 5], True))
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    matrices = [torch.randn(5, 8, requires_grad=True) for _ in range(2)]
    opcheck(ops.grouped_mm_list.default, (tokens, matrices, offsets, 0.7))
    every = torch.tensor([1, 6], dtype=torch.int32)
    opcheck(ops.grouped_mm_list.default, (tokens, matrices, every, None))
    weight = torch.randn(2, 5, 8, requires_grad=True)
    opcheck(ops.grouped_mm.default, (tokens, weight, offsets, 0.7))
