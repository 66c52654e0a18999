"""MC2's two ops over any group: as dense experts would, whatever the routing; opcheck."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from moe_fx.ops import distribute
from moe_fx.testing import RankPool

ops = torch.ops.moe_fx
H = 3


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """(ids [W, T, K] of every rank, experts, ranks); no token meets an expert twice."""
    world, local = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = world * local
    top_k, num_tokens = draw(st.integers(1, min(3, experts))), draw(st.integers(0, 6))
    chosen = [draw(st.permutations(range(experts)))[:top_k] for _ in range(world * num_tokens)]
    ids = torch.tensor(chosen, dtype=torch.int32).reshape(world, num_tokens, top_k)
    return ids, experts, world


@settings(max_examples=60, deadline=None)
@given(routings())
def test_there_and_back_is_the_weighted_sum(case: tuple[Tensor, int, int]) -> None:
    """Expert ``e`` multiplies by ``e + 1``."""
    ids, experts, world = case
    local = experts // world
    tokens, weights = torch.randn(*ids.shape[:2], H), torch.rand(ids.shape)
    sent = []
    for rank in range(world):
        rows, counts, assist, ends = distribute.share(
            tokens.flatten(0, 1), ids.flatten(0, 1), rank, world, experts
        )
        own = torch.bincount(ids.flatten(), minlength=experts)[rank * local : (rank + 1) * local]
        assert torch.equal(counts, own) and (counts.sum() == 0 or ends[-1] == counts.sum())
        factor = 1 + rank * local + ops.row_experts(counts, len(rows))
        sent.append(distribute.parcels(rows * factor.unsqueeze(1), assist, ends, world))
    pieces = [rows.split(sizes) for rows, sizes in sent]
    for rank in range(world):
        assert [sizes[rank] for _, sizes in sent] == distribute.owners(ids[rank], experts, world)
        arrived = torch.cat([piece[rank] for piece in pieces])
        found = distribute.summed(arrived, ids[rank], weights[rank])
        expected = tokens[rank] * (weights[rank] * (ids[rank] + 1)).sum(-1, keepdim=True)
        torch.testing.assert_close(found, expected)


def checked(rank: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    tokens, ids = torch.randn(4, H), torch.randint(2, (4, 1), dtype=torch.int32)
    given = (tokens, ids, 2, group.group_name)
    opcheck(ops.distribute.default, given, test_utils=("test_schema", "test_faketensor"))
    rows, _, assist, ends = ops.distribute(*given)
    back = (rows, ids, torch.rand(4, 1), assist, ends, 2, group.group_name)
    opcheck(ops.collect.default, back, test_utils=("test_schema", "test_faketensor"))


def test_opcheck(ranks2: RankPool) -> None:
    ranks2.run(checked)


def uneven(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    ids = torch.zeros(3 + rank, 1, dtype=torch.int32)
    try:
        ops.distribute(torch.randn(3 + rank, H), ids, 2, group.group_name)
    except RuntimeError as error:
        return str(error)
    return ""


def test_uneven_tokens_are_an_error_on_every_rank(ranks2: RankPool) -> None:
    for message in ranks2.run(uneven):
        assert "the ranks have [3, 4] tokens" in message
