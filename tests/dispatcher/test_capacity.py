"""Capacity: which pairs are kept, that others add nothing, and buffers of one size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_fx
from moe_fx.dispatcher.capacity import kept_keys, padded_slots
from tests.dispatcher.layers import Weights, tokens_of

EXPERTS, TOP_K = 8, 3


def kept_by_the_book(probs: Tensor, ids: Tensor, capacity: int) -> Tensor:
    """``[T, K]`` bool: by expert, the pairs that weigh most, of equal ones the earlier."""
    kept = torch.zeros(ids.shape, dtype=torch.bool)
    for expert in range(EXPERTS):
        pairs = [(-float(probs[t, k]), t, k) for t, k in (ids == expert).nonzero().tolist()]
        for _, t, k in sorted(pairs)[:capacity]:
            kept[t, k] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9), capacity=st.integers(0, 7), coarse=st.booleans(), seed=st.integers(0)
)
def test_the_pairs_that_weigh_most_are_kept(
    tokens: int, capacity: int, coarse: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    probs = torch.rand(tokens, TOP_K, generator=generator)
    probs = (probs * 3).round() if coarse else probs
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    expected = kept_by_the_book(probs, ids, capacity)
    assert torch.equal(kept_keys(ids, probs, EXPERTS, capacity) < EXPERTS, expected)
    slots = padded_slots(ids, probs, EXPERTS, capacity).view(ids.shape)
    assert torch.equal(slots < EXPERTS * capacity, expected)
    used = slots[expected]
    assert used.unique().numel() == used.numel()
    assert torch.equal(used // max(1, capacity), ids[expected].int())


def limited(rank: int, factor: float, pad: bool, lengths: tuple[int, ...]) -> dict[str, Any]:
    world = dist.get_world_size()
    local = EXPERTS // world
    x, probs, ids = tokens_of(rank, lengths[rank], EXPERTS, TOP_K, skew=0.4)
    weights = Weights.make(EXPERTS)
    config = moe_fx.MoEDispatcherConfig(
        num_local_experts=local,
        moe_expert_capacity_factor=factor,
        moe_pad_expert_input_to_capacity=pad,
    )
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)
    x, probs = x.requires_grad_(), probs.requires_grad_()
    own = weights.own(rank * local, local)
    _, rows, counts = d.token_permutation(x, probs, ids)
    out, _ = d.token_unpermutation(own.experts(rows, counts))
    out.square().sum().backward()
    capacities = [math.ceil(n * TOP_K / EXPERTS * factor) for n in lengths[:world]]
    kept = kept_by_the_book(probs.detach(), ids, capacities[rank])
    leaf, leaf_probs = x.detach().requires_grad_(), probs.detach().requires_grad_()
    expected = weights.dense(leaf, leaf_probs * kept, ids)
    expected.square().sum().backward()
    assert x.grad is not None and leaf.grad is not None
    assert probs.grad is not None and leaf_probs.grad is not None
    dropped = ~kept.any(1)
    return {
        "error": _distance(out, expected),
        "gradient": _distance(x.grad, leaf.grad),
        "probs": _distance(probs.grad, leaf_probs.grad),
        "dropped": bool(dropped.any()) and bool((out[dropped] == 0).all()),
        "counts": counts.tolist(),
        "each": sum(capacities),
    }


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max()) if left.numel() else 0.0


@pytest.mark.parametrize("pad", [False, True], ids=["dropping", "padded"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_dropped_pair_adds_nothing(moe_fx_ranks: Any, world: int, pad: bool) -> None:
    found = moe_fx_ranks(world).run(limited, 0.2, pad, (9, 12, 7, 0))
    assert any(each["dropped"] for each in found)
    for each in found:
        assert max(each["error"], each["gradient"], each["probs"]) <= 1e-12
        if pad:
            assert set(each["counts"]) == {each["each"]}


def test_ample_capacity_drops_nothing(moe_fx_ranks: Any) -> None:
    for each in moe_fx_ranks(2).run(limited, 8.0, False, (9, 12)):
        assert each["error"] <= 1e-12 and not each["dropped"]
