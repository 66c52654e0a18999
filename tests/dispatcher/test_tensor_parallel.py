"""Four ranks as two by two: tokens split by sequence, experts by rank and by width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moe_fx
from moe_fx.dispatcher import tensor_parallel as tp
from moe_fx.testing import RankPool
from tests.dispatcher.layers import Weights, tokens_of

EXPERTS, TOP_K, WIDTH = 8, 3, 12


def groups(rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(expert parallel, tensor parallel): ranks 0, 2 and 1, 3; ranks 0, 1 and 2, 3."""
    made = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    return made[rank % 2], made[2 + rank // 2]


class Sliced:
    """This rank's experts, a slice of their width."""

    def __init__(self, whole: Weights, ep_rank: int, tp_rank: int) -> None:
        own, half = slice(4 * ep_rank, 4 * ep_rank + 4), WIDTH // 2
        columns = slice(half * tp_rank, half * (tp_rank + 1))
        gate, value = whole.up[own].detach().chunk(2, dim=-1)
        self.up = torch.cat([gate[..., columns], value[..., columns]], -1).requires_grad_()
        self.down = whole.down[own, columns].detach().clone().requires_grad_()

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        done = []
        for piece, up, down in zip(rows.split(counts.tolist()), self.up, self.down, strict=True):
            gate, value = (piece @ up).chunk(2, dim=-1)
            done.append((F.silu(gate) * value) @ down)
        return torch.cat(done)


def run(rank: int, grouped: bool, lengths: tuple[int, int]) -> dict[str, float]:
    ep_group, tp_group = groups(rank)
    everyone = [tokens_of(at, lengths[at // 2], EXPERTS, TOP_K) for at in range(4)]
    whole = Weights.make(EXPERTS, width=WIDTH)
    whole.up.requires_grad_(), whole.down.requires_grad_()
    leaves = [(x.requires_grad_(), p.requires_grad_(), ids) for x, p, ids in everyone]
    expected = [whole.dense(*each) for each in leaves]
    sum(out.square().sum() for out in expected).backward()  # type: ignore[union-attr]

    x, probs, ids = (t.detach() for t in leaves[rank])
    x, probs = x.requires_grad_(), probs.requires_grad_()
    config = moe_fx.MoEDispatcherConfig(
        num_moe_experts=EXPERTS, num_local_experts=4, moe_grouped_gemm=grouped
    )
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, ep_group, tp_group)
    assert (d.ep_size, d.tp_ep_size) == (2, 2)
    experts = Sliced(whole, d.ep_rank, tp_group.rank())
    _, rows, counts = d.token_permutation(x, probs, ids)
    if not grouped:
        assert rows.shape[1] == x.shape[1] // 2
        rows = tp.all_gather_last_dim_from_tensor_parallel_region(rows, tp_group)
    out, _ = d.token_unpermutation(experts(rows, counts))
    out.square().sum().backward()

    own, half = slice(4 * d.ep_rank, 4 * d.ep_rank + 4), WIDTH // 2
    columns = slice(half * tp_group.rank(), half * (tp_group.rank() + 1))
    assert whole.up.grad is not None and whole.down.grad is not None
    gate, value = whole.up.grad[own].chunk(2, dim=-1)
    pairs: dict[str, tuple[Any, Any]] = {
        "output": (out, expected[rank]),
        "tokens": (x.grad, leaves[rank][0].grad),
        "probs": (probs.grad, leaves[rank][1].grad),
        "up": (experts.up.grad, torch.cat([gate[..., columns], value[..., columns]], -1)),
        "down": (experts.down.grad, whole.down.grad[own, columns]),
    }
    return {
        name: float((a - b).abs().max()) if a.numel() else 0.0 for name, (a, b) in pairs.items()
    }


@pytest.mark.parametrize("lengths", [(6, 6), (5, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("grouped", [True, False])
def test_two_by_two_equals_one_process(
    ranks4: RankPool, grouped: bool, lengths: tuple[int, int]
) -> None:
    for errors in ranks4.run(run, grouped, lengths):
        assert max(errors.values()) <= 1e-12, errors


def one_batch(rank: int) -> float:
    """Tensor-parallel ranks with the same tokens, an odd number: padded and split before, gathered
    and unpadded after, as vLLM-Ascend's callers do."""
    ep_group, tp_group = groups(rank)
    x, probs, ids = tokens_of(rank // 2, 5, EXPERTS, TOP_K)
    whole = Weights.make(EXPERTS, width=WIDTH)
    config = moe_fx.MoEDispatcherConfig(
        num_moe_experts=EXPERTS, num_local_experts=4, moe_grouped_gemm=True
    )
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, ep_group, tp_group)
    own = [F.pad(t, (0, 0, 0, 1)).chunk(2)[tp_group.rank()] for t in (x, probs, ids)]
    with torch.no_grad():
        _, rows, counts = d.token_permutation(*own)
        out, _ = d.token_unpermutation(Sliced(whole, d.ep_rank, tp_group.rank())(rows, counts))
        out = tp.gather_from_sequence_parallel_region(out, tp_group)[: x.shape[0]]
        return float((out - whole.dense(x, probs, ids)).abs().max())


def test_a_batch_that_ranks_share_is_padded_and_split_by_the_caller(ranks4: RankPool) -> None:
    assert max(ranks4.run(one_batch)) <= 1e-12


def uneven(rank: int, bad: str) -> str:
    ep_group, tp_group = groups(rank)
    x, probs, ids = tokens_of(rank, 6 + (bad == "tokens") * (rank == 1), EXPERTS, TOP_K)
    if bad == "shape" and rank == 1:
        ids = ids.reshape(-1)
    if bad == "id" and rank == 1:
        ids = ids + EXPERTS
    config = moe_fx.MoEDispatcherConfig(num_moe_experts=EXPERTS, num_local_experts=4)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, ep_group, tp_group)
    try:
        d.token_permutation(x, probs, ids)
    except moe_fx.BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("tokens", "[6, 7] tokens"),
        ("shape", "Expected 2D tensor for routing map"),
        ("id", "an expert id is"),
    ],
)
def test_what_one_rank_got_wrong_all_four_are_told(ranks4: RankPool, bad: str, said: str) -> None:
    found = ranks4.run(uneven, bad)
    assert all(found), found
    assert said in found[1]


def helpers(rank: int) -> dict[str, bool]:
    group = dist.group.WORLD
    assert group is not None
    world, n, hidden = 4, 3, 8
    everyone = torch.arange(world * n * hidden, dtype=torch.float64).view(world * n, hidden)
    own = everyone[rank * n : (rank + 1) * n].clone().requires_grad_()
    width = hidden // world
    sliced = everyone[:, rank * width : (rank + 1) * width]
    hp = tp.all_to_all_sp2hp(own, group)
    back = tp.all_to_all_hp2sp(hp, group)
    gathered = tp.all_gather_last_dim_from_tensor_parallel_region(sliced.contiguous(), group)
    scattered = tp.reduce_scatter_last_dim_to_tensor_parallel_region(everyone * (rank + 1), group)
    sequence = tp.gather_from_sequence_parallel_region(own, group)
    summed = tp.reduce_scatter_to_sequence_parallel_region(sequence, group)
    (back.sum() + summed.sum()).backward()
    assert own.grad is not None
    return {
        "sp2hp": torch.equal(hp, sliced),
        "hp2sp": torch.equal(back, own),
        "gather last": torch.equal(gathered, everyone),
        "scatter last": torch.equal(scattered, sliced * 10),
        "gather": torch.equal(sequence, everyone),
        "scatter": torch.equal(summed, own * 4),
        # each rank's block is in every rank's gathered tensor, and each of those is summed
        "gradient": torch.equal(own.grad, torch.full_like(own, 1.0 + 4.0)),
    }


def test_what_the_helpers_do(ranks4: RankPool) -> None:
    for found in ranks4.run(helpers):
        assert all(found.values()), found


def test_one_rank_or_none_changes_nothing() -> None:
    x = torch.ones(2, 4)
    for helper in (
        tp.all_to_all_sp2hp,
        tp.all_to_all_hp2sp,
        tp.all_gather_last_dim_from_tensor_parallel_region,
        tp.reduce_scatter_last_dim_to_tensor_parallel_region,
        tp.gather_from_sequence_parallel_region,
        tp.reduce_scatter_to_sequence_parallel_region,
    ):
        assert helper(x, None) is x
