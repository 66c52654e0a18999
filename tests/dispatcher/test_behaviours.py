"""The original's behaviours, each by name, on real ranks and in fp64.

Elsewhere: counts, splits and maps as in the original itself (`test_original.py`, worlds of 1, 2 and
4, no tokens at all included), its memory (there too), its phases and two micro-batches
(`test_interleave.py`), routing fields (`test_route.py`), capacity (`test_capacity.py`), the
tensor-parallel way (`test_tensor_parallel.py`), what it asserts of its input (`test_bad_input.py`).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import moe_fx
from moe_fx.testing import RankPool
from tests.dispatcher.layers import Weights, tokens_of
from tests.dispatcher.original import token_permute

EXPERTS, TOP_K = 8, 3


def dispatcher(**fields: Any) -> moe_fx.MoEAlltoAllSeqOverLapDispatcher:
    world = dist.get_world_size()
    config = moe_fx.MoEDispatcherConfig(
        num_moe_experts=EXPERTS, num_local_experts=EXPERTS // world, **fields
    )
    return moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)


def all_tokens(world: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tokens_of(rank, length + rank, EXPERTS, TOP_K) for rank in range(world)]


def rows_by_expert(rank: int) -> dict[str, Any]:
    """What a rank got, and what every rank sent it, in the order described."""
    world = dist.get_world_size()
    local = EXPERTS // world
    everyone = all_tokens(world, 6)
    d = dispatcher()
    shared, rows, counts = d.token_permutation(*everyone[rank])
    expected = [
        x[token]
        for expert in range(rank * local, (rank + 1) * local)
        for x, _, ids in everyone
        for token, chosen in enumerate(ids.tolist())
        if expert in chosen
    ]
    d.token_unpermutation(rows)
    return {
        "rows": torch.equal(rows, torch.stack(expected)),
        "counts": counts.tolist(),
        "shared": shared,
        "expected counts": [
            sum(int((ids == expert).sum()) for _, _, ids in everyone)
            for expert in range(rank * local, (rank + 1) * local)
        ],
    }


def test_rows_arrive_by_local_expert_then_by_source_rank(ranks2: RankPool) -> None:
    for seen in ranks2.run(rows_by_expert):
        assert seen["rows"] and seen["counts"] == seen["expected counts"]
        assert seen["shared"] is None


def state(rank: int) -> dict[str, Any]:
    x, probs, ids = tokens_of(rank, 6 + rank, EXPERTS, TOP_K)
    d = dispatcher()
    _, rows, _ = d.token_permutation(x, probs, ids)
    counts = torch.bincount(ids.reshape(-1), minlength=EXPERTS)
    _, row_map = token_permute(x, ids)
    gathered = d.global_input_tokens_local_experts_indices
    assert gathered is not None and d.num_global_tokens_per_local_expert is not None
    during = {
        "dropless": d.num_out_tokens == ids.numel(),
        "sent": d.input_splits.tolist() == counts.view(2, -1).sum(1).tolist(),
        "received": d.output_splits.tolist()
        == d.num_global_tokens_per_local_expert.sum(1).tolist(),
        "row_map": torch.equal(d.reversed_local_input_permutation_mapping, row_map),
        "int32": d.reversed_local_input_permutation_mapping.dtype == torch.int32,
        "arrived": gathered.tolist()
        == [
            e
            for row in d.num_global_tokens_per_local_expert
            for e, n in enumerate(row)
            for _ in range(n)
        ],
        "probs": d.probs is probs,
    }
    d.token_unpermutation(rows)
    after = [d.probs, d.input_splits, d.reversed_local_input_permutation_mapping, d.hidden_shape]
    return during | {"all dropped": after == [None] * 4}


def test_state_of_a_step_is_there_until_its_end(ranks2: RankPool) -> None:
    for seen in ranks2.run(state):
        assert all(seen.values()), seen


def shared_order(rank: int) -> list[str]:
    """The order of things on a rank."""
    events: list[str] = []
    d = dispatcher()
    x, probs, ids = tokens_of(rank, 6, EXPERTS, TOP_K)
    work = torch.ops.moe_fx

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (work.all_to_all.default, work.wait.default):
                events.append(str(func))
            return func(*args, **(kwargs or {}))

    def shared(tokens: Tensor) -> tuple[Tensor, None]:
        events.append("shared experts")
        assert torch.equal(tokens, x)
        return tokens * 2, None

    d.set_shared_experts(shared)
    with Watch(), torch.no_grad():
        result, rows, _ = d.token_permutation(x, probs, ids)
        d.token_unpermutation(rows)
    assert torch.equal(result, x * 2)
    return events


def test_shared_experts_run_on_the_tokens_while_rows_travel(ranks2: RankPool) -> None:
    for events in ranks2.run(shared_order):
        start, wait = "moe_fx.all_to_all.default", "moe_fx.wait.default"
        assert events == [start, "shared experts", wait, start, wait]


class Seen(TorchDispatchMode):
    """Every op of the dialect that is called, and the storage of what it returns first."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.storages: dict[str, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "moe_fx":
            name = func._opname
            self.ops.append(name)
            first = result[0] if isinstance(result, (tuple, list)) else result
            self.storages.setdefault(name, StorageWeakRef(first.untyped_storage()))
        return result

    def freed(self, name: str) -> bool:
        """Gloo's own thread lets go of buffers a moment after their exchange is done."""
        deadline = time.monotonic() + 10
        while not self.storages[name].expired() and time.monotonic() < deadline:
            time.sleep(1e-3)
        return self.storages[name].expired()


def freed(rank: int) -> dict[str, bool]:
    """Which buffers are gone once a phase is over, while the step goes on."""
    d = dispatcher()
    with torch.no_grad(), Seen() as seen:
        _, rows, _ = d.token_permutation(*tokens_of(rank, 6, EXPERTS, TOP_K))
        gone = {name: seen.freed(name) for name in ("permute", "wait")}
        d.token_unpermutation(rows)
        del rows
    return gone | {"regroup": seen.freed("regroup")}


def test_sent_and_received_buffers_are_free_as_soon_as_they_are_used(ranks2: RankPool) -> None:
    for gone in ranks2.run(freed):
        assert all(gone.values()), gone


def one_expert_a_rank(rank: int) -> tuple[list[str], float]:
    config = moe_fx.MoEDispatcherConfig(num_local_experts=1)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)
    x, probs, ids = tokens_of(rank, 5, 2, 1)
    with torch.no_grad(), Seen() as seen:
        _, rows, _ = d.token_permutation(x, probs, ids)
        out, _ = d.token_unpermutation(rows * 2)
    return seen.ops, float((out - 2 * x * probs).abs().max())


def test_rows_for_one_local_expert_are_not_sorted_again(ranks2: RankPool) -> None:
    for ops, error in ranks2.run(one_expert_a_rank):
        assert "regroup" not in ops and ops.count("unpermute") == 1
        assert error <= 1e-14


def stream_beside(rank: int) -> bool:
    shared_order(rank)
    return moe_fx.MoEAlltoAllSeqOverLapDispatcher.overlap_stream is None


def test_there_is_no_stream_beside_on_the_cpu(ranks2: RankPool) -> None:
    assert ranks2.run(stream_beside) == [True, True]


def scaled(rank: int) -> float:
    """The factor is on the routed part alone; the caller adds the shared part after it."""
    d = dispatcher(scaling_factor=2.5, moe_router_topk=TOP_K)
    x = tokens_of(rank, 5, EXPERTS, TOP_K)[0]
    logits = x[:, :EXPERTS]
    d.set_shared_experts(lambda tokens: tokens * 10)
    probs, ids = d.route(logits)
    shared, rows, _ = d.token_permutation(x, probs, ids)
    out, _ = d.token_unpermutation(rows)
    weight = 2.5 * logits.float().softmax(-1).topk(TOP_K).values.sum(1, keepdim=True)
    return float((out + shared - (x * weight + 10 * x)).abs().max())


def test_the_scaling_factor_is_not_on_the_shared_experts(ranks2: RankPool) -> None:
    assert max(ranks2.run(scaled)) <= 1e-6


def weights_at_the_source(rank: int) -> float:
    """Experts that do nothing: the weights never travel, and are exact."""
    d = dispatcher()
    x, probs, ids = tokens_of(rank, 5, EXPERTS, TOP_K)
    _, rows, _ = d.token_permutation(x, probs, ids)
    out, _ = d.token_unpermutation(rows)
    return float((out - x * probs.sum(1, keepdim=True)).abs().max())


def test_weights_are_applied_where_the_token_is(ranks2: RankPool) -> None:
    assert max(ranks2.run(weights_at_the_source)) <= 1e-14


def shapes(rank: int) -> list[tuple[int, ...]]:
    d = dispatcher()
    x, probs, ids = tokens_of(rank, 6, EXPERTS, TOP_K)
    _, rows, _ = d.token_permutation(x.view(2, 3, -1), probs, ids)
    out, nothing = d.token_unpermutation(rows)
    assert nothing is None
    return [tuple(rows.shape[1:]), tuple(out.shape)]


def test_the_output_has_the_shape_of_the_input(ranks2: RankPool) -> None:
    assert ranks2.run(shapes) == [[(16,), (2, 3, 16)]] * 2


def sync_points(rank: int) -> list[str]:
    return [
        dispatcher().device_sync_point,
        dispatcher(moe_expert_capacity_factor=1.0).device_sync_point,
        dispatcher(
            moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True
        ).device_sync_point,
    ]


def test_where_the_host_waits_is_said(ranks2: RankPool, moe_fx_ranks: Any) -> None:
    assert (
        ranks2.run(sync_points)
        == [["before_ep_alltoall", "before_permutation_1", "before_ep_alltoall"]] * 2
    )
    assert moe_fx_ranks(1).run(sync_points)[0][0] == "no_sync"


def local_indices(rank: int) -> tuple[list[int], list[int]]:
    d = dispatcher()
    return d.local_expert_indices, d.expert_ids_per_ep_rank.tolist()


def test_a_rank_owns_contiguous_experts(ranks2: RankPool) -> None:
    assert ranks2.run(local_indices) == [
        ([0, 1, 2, 3], [0, 1, 2, 3] * 2),
        ([4, 5, 6, 7], [0, 1, 2, 3] * 2),
    ]


def preprocessed(rank: int) -> bool:
    _, _, ids = tokens_of(rank, 6 + rank, EXPERTS, TOP_K)
    d = dispatcher()
    found = d.preprocess(ids)
    everyone = torch.cat([own for _, _, own in all_tokens(2, 6)])
    return (
        found.tolist()
        == torch.bincount(everyone.reshape(-1), minlength=EXPERTS).view(2, -1)[rank].tolist()
    )


def test_preprocess_counts_the_rows_of_local_experts(ranks2: RankPool) -> None:
    assert ranks2.run(preprocessed) == [True, True]


def test_one_process_without_a_group_exchanges_nothing() -> None:
    assert not dist.is_initialized()
    x, probs, ids = tokens_of(0, 6, EXPERTS, TOP_K)
    weights = Weights.make(EXPERTS)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(
        moe_fx.MoEDispatcherConfig(num_local_experts=EXPERTS)
    )
    assert (d.ep_size, d.ep_rank, d.tp_ep_size, d.ep_group, d.tp_ep_group) == (1, 0, 1, None, None)
    _, rows, counts = d.token_permutation(x, probs, ids)
    out, _ = d.token_unpermutation(weights.experts(rows, counts))
    assert d.input_splits is None
    assert torch.allclose(out, weights.dense(x, probs, ids), atol=1e-13, rtol=0)


def test_a_bias_is_refused() -> None:
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(moe_fx.MoEDispatcherConfig(num_local_experts=2))
    with pytest.raises(moe_fx.BadInput, match="Bias"):
        d.token_unpermutation(torch.ones(1, 2), torch.ones(2))


def test_a_phase_before_its_time_is_refused() -> None:
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(moe_fx.MoEDispatcherConfig(num_local_experts=2))
    with pytest.raises(RuntimeError, match="call preprocess_and_permute1 first"):
        d.dispatch_alltoall()


def gradients(rank: int, world: int) -> dict[str, float]:
    """Of tokens, weights and this rank's experts, against all ranks' tokens in one dense layer."""
    local = EXPERTS // world
    everyone = all_tokens(world, 4)
    whole = Weights.make(EXPERTS)
    leaves = [whole.up.requires_grad_(), whole.down.requires_grad_()]
    inputs = [(x.requires_grad_(), p.requires_grad_(), ids) for x, p, ids in everyone]
    sum(whole.dense(*each).square().sum() for each in inputs).backward()  # type: ignore[union-attr]
    x, probs, ids = (t.detach() for t in inputs[rank])
    x, probs = x.requires_grad_(), probs.requires_grad_()
    own = whole.own(rank * local, local)
    own.up, own.down = (t.detach().requires_grad_() for t in (own.up, own.down))
    d = dispatcher()
    _, rows, counts = d.token_permutation(x, probs, ids)
    out, _ = d.token_unpermutation(own.experts(rows, counts))
    out.square().sum().backward()
    mine = slice(rank * local, (rank + 1) * local)
    pairs = {
        "tokens": (x.grad, inputs[rank][0].grad),
        "probs": (probs.grad, inputs[rank][1].grad),
        "up": (own.up.grad, leaves[0].grad[mine]),  # type: ignore[index]
        "down": (own.down.grad, leaves[1].grad[mine]),  # type: ignore[index]
    }
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}  # type: ignore[operator]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_those_of_all_tokens(moe_fx_ranks: Any, world: int) -> None:
    for errors in moe_fx_ranks(world).run(gradients, world):
        assert max(errors.values()) <= 1e-12, errors
