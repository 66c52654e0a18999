"""Counts with a status, the sizes it is read with, and what arrives: values and opcheck."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_fx
from moe_fx.ops.checked import FINE, OUT_OF_RANGE, REFUSED
from moe_fx.testing import RankPool

ops = torch.ops.moe_fx


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(-3, 7), max_size=12), experts=st.integers(1, 6))
def test_counts_and_status(ids: list[int], experts: int) -> None:
    counts, status = ops.dispatch_counts(torch.tensor(ids, dtype=torch.int64), experts, 16, 2)
    good = [i for i in ids if 0 <= i < experts]
    assert counts.tolist() == [good.count(expert) for expert in range(experts)]
    code, worst, *facts = status.tolist()
    assert facts == [16, 2, experts]
    bad = set(ids) - set(good)
    assert code == (OUT_OF_RANGE if bad else FINE)
    assert worst in bad or (not bad and worst == 0)


def gathered(rank: int) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    counts, status = ops.dispatch_counts(torch.arange(rank + 3), 4, 16, 0)
    return ops.gather_counts(counts, status, group.group_name, 30.0)


def test_every_rank_has_all_counts(ranks2: RankPool) -> None:
    first, second = ranks2.run(gathered)
    assert first.tolist() == second.tolist()
    assert first.tolist() == [[1, 1, 1, 0, 0, 0, 16, 0, 4], [1, 1, 1, 1, 0, 0, 16, 0, 4]]


def test_sizes_by_chunk_of_experts() -> None:
    everyone = torch.tensor([[1, 2, 3, 4, 0, 0, 8, 0, 4], [5, 6, 7, 8, 0, 0, 8, 0, 4]])
    for rank in range(2):
        whole = ops.checked_sizes(everyone, 4, rank)
        assert whole.tolist() == [[[3, 7], [3, 11]], [[11, 15], [7, 15]]][rank : rank + 1]
        assert ops.checked_sizes(everyone, 4, rank, 2).sum(0).tolist() == whole[0].tolist()
    assert ops.checked_sizes(everyone, 4, 0, 2).tolist() == [[[1, 3], [1, 5]], [[2, 4], [2, 6]]]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ([REFUSED, 0, 0, 0, 4], "rank 1 raised an error of its own"),
        ([OUT_OF_RANGE, 9, 8, 0, 4], "rank 1: an expert id is 9, expected 0 to 3"),
        (
            [FINE, 0, 4, 0, 4],
            "rank 0 has 8 features of torch.float32 for 4 experts, rank 1 has 4 f",
        ),
        ([FINE, 0, 8, 3, 4], "rank 1 has 8 features of torch.bfloat16"),
        ([FINE, 0, 8, 0, 8], "rank 1 has 8 features of torch.float32 for 8 experts"),
    ],
)
def test_a_bad_status_is_an_error(status: list[int], said: str) -> None:
    everyone = torch.tensor([[1, 2, 3, 4, FINE, 0, 8, 0, 4], [5, 6, 7, 8, *status]])
    with pytest.raises(moe_fx.BadInput, match=said):
        ops.checked_sizes(everyone, 4, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=3))
def test_experts_of_rows_as_they_arrive(table: list[list[int]]) -> None:
    counts = torch.tensor(table)
    found = ops.arrived_experts(counts, int(counts.sum()))
    expected = [expert for row in table for expert, n in enumerate(row) for _ in range(n)]
    assert found.tolist() == expected


def checked(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    counts, status = ops.dispatch_counts(torch.tensor([0, 1, 3]), 4, 16, 0)
    opcheck(ops.gather_counts, (counts, status, group.group_name, 30.0))


def test_opcheck(ranks2: RankPool) -> None:
    ranks2.run(checked)
    opcheck(ops.dispatch_counts.default, (torch.tensor([[0, 3], [1, 9]]), 4, 16, 0))
    everyone = torch.tensor([[1, 2, 3, 4, 0, 0, 8, 0, 4], [5, 6, 7, 8, 0, 0, 8, 0, 4]])
    opcheck(ops.checked_sizes.default, (everyone, 4, 1, 2))
    opcheck(ops.arrived_experts.default, (torch.tensor([[1, 0], [2, 1]]), 4))


def test_pairs_that_no_chunk_has_room_for_are_dropped() -> None:
    """Their keys are the highest; gradients are those of the rows that travel."""
    tokens = torch.randn(3, 4, requires_grad=True)
    keys = torch.tensor([[0, 5], [2, 0], [5, 5]])
    sizes = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]]])
    rows, row_map = ops.permute_chunks(tokens, keys, sizes)
    assert [len(piece) for piece in rows] == [2, 1]
    assert torch.equal(torch.cat(list(rows)), tokens[[0, 1, 1]])
    weights = torch.rand(3, 2, requires_grad=True)
    out = ops.unpermute_chunks(list(rows), row_map, weights, [3, 4])
    kept = torch.tensor([[1, 0], [1, 1], [0, 0]])
    expected = tokens * (weights * kept).sum(1, keepdim=True)
    assert torch.allclose(out, expected)
    found = torch.autograd.grad(out.square().sum(), (tokens, weights))
    wanted = torch.autograd.grad(expected.square().sum(), (tokens, weights))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
