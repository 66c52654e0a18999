"""Against the original class itself, on the CPU (skipped where its wheel cannot be had)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_fx
from moe_fx.testing import RankPool
from tests.dispatcher.layers import Weights, tokens_of
from tests.dispatcher.original import Unavailable, fetch, original

EXPERTS, TOP_K = 8, 3
EXACT = 1e-12
LENGTHS = {
    "ragged": (7, 8, 9, 10),
    "one token": (1, 1, 1, 1),
    "a rank without": (5, 0, 0, 2),
    "none at all": (0, 0, 0, 0),
}


@pytest.fixture(scope="session")
def wheel() -> Path:
    try:
        return fetch()
    except Unavailable as reason:
        pytest.skip(str(reason))


@dataclass
class Way:
    """What a dispatcher showed of itself on one rank."""

    shared: Tensor
    rows: Tensor
    counts: Tensor
    splits: tuple[Any, Any]
    received: Tensor
    row_map: Tensor
    shapes: tuple[Any, Any, int]
    out: Tensor


def whole_way(dispatcher: Any, weights: Weights, x: Tensor, probs: Tensor, ids: Tensor) -> Way:
    dispatcher.set_shared_experts(weights.share)
    shared, rows, counts = dispatcher.token_permutation(x, probs, ids)
    seen = _seen(dispatcher)
    out, bias = dispatcher.token_unpermutation(weights.experts(rows, counts))
    assert bias is None
    return Way(shared, rows.clone(), counts, *seen, out)


def phases(dispatcher: Any, weights: Weights, x: Tensor, probs: Tensor, ids: Tensor) -> Way:
    dispatcher.preprocess_and_permtute1(x, probs, ids, weights.share, x)
    seen = _seen(dispatcher)
    dispatcher.dispatch_alltoall()
    rows, counts = dispatcher.permute2()
    kept = rows.clone()
    dispatcher.unpermute1(weights.experts(rows, counts))
    dispatcher.combine_alltoall()
    shared = dispatcher.cached_shared_expert_output[0]
    return Way(shared, kept, counts, *seen, dispatcher.unpermute2())


def _seen(dispatcher: Any) -> tuple[Any, ...]:
    def numbers(splits: Any) -> Any:
        return None if splits is None else [int(size) for size in splits]

    return (
        (numbers(dispatcher.input_splits), numbers(dispatcher.output_splits)),
        dispatcher.num_global_tokens_per_local_expert.clone(),
        dispatcher.reversed_local_input_permutation_mapping.clone(),
        (
            tuple(dispatcher.hidden_shape),
            tuple(dispatcher.hidden_shape_before_permute),
            dispatcher.num_out_tokens,
        ),
    )


def both(rank: int, root: Path, lengths: tuple[int, ...], way: str) -> tuple[Way, Way, Tensor]:
    """(the original's way, ours, what a dense layer gives)."""
    group = dist.group.WORLD
    assert group is not None
    local = EXPERTS // group.size()
    x, probs, ids = tokens_of(rank, lengths[rank], EXPERTS, TOP_K)
    whole = Weights.make(EXPERTS)
    own = whole.own(rank * local, local)
    go = {"whole": whole_way, "phases": phases}[way]
    with torch.no_grad():
        with original(root, group) as module:
            config = module.MoEDispatcherConfig().set_num_local_experts(local)
            config = config.set_num_moe_experts(EXPERTS).set_moe_router_topk(TOP_K).build()
            theirs = go(module.MoEAlltoAllSeqOverLapDispatcher(config), own, x, probs, ids)
        ours = moe_fx.MoEDispatcherConfig().set_num_local_experts(local)
        ours = ours.set_num_moe_experts(EXPERTS).set_moe_router_topk(TOP_K).build()
        mine = go(moe_fx.MoEAlltoAllSeqOverLapDispatcher(ours), own, x, probs, ids)
        return theirs, mine, whole.dense(x, probs, ids)


@pytest.mark.parametrize("way", ["whole", "phases"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_everything_is_as_in_the_original(
    moe_fx_ranks: Any, wheel: Path, world: int, lengths: str, way: str
) -> None:
    pool: RankPool = moe_fx_ranks(world)
    for theirs, ours, dense in pool.run(both, wheel, LENGTHS[lengths], way):
        assert torch.equal(theirs.rows, ours.rows)
        assert theirs.counts.tolist() == ours.counts.tolist()
        assert theirs.splits == ours.splits
        assert theirs.received.tolist() == ours.received.tolist()
        assert theirs.row_map.dtype == ours.row_map.dtype == torch.int32
        assert theirs.row_map.tolist() == ours.row_map.tolist()
        assert theirs.shapes == ours.shapes
        assert _distance(theirs.shared, ours.shared) == 0
        assert theirs.out.shape == ours.out.shape
        assert _distance(theirs.out, ours.out) <= EXACT
        assert _distance(dense, ours.out) <= EXACT


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max()) if left.numel() else 0.0


def peak(rank: int, root: Path, name: str) -> float:
    """The most bytes alive at once during one inference step, over those before it."""
    from tests.dispatcher.memory import peak_bytes

    group = dist.group.WORLD
    assert group is not None
    x, probs, ids = tokens_of(rank, 256, EXPERTS, TOP_K, hidden=64)

    def step(dispatcher: Any) -> None:
        _, rows, _ = dispatcher.token_permutation(x, probs, ids)
        result = rows * 2
        del rows
        dispatcher.token_unpermutation(result)

    with torch.no_grad(), original(root, group) as module:
        library = module if name == "original" else moe_fx
        config = library.MoEDispatcherConfig().set_num_local_experts(EXPERTS // 2)
        config = config.set_num_moe_experts(EXPERTS).build()
        dispatcher = library.MoEAlltoAllSeqOverLapDispatcher(config)
        step(dispatcher)
        # Gloo's thread lets go of what it has sent soon after the wait: by then or not by chance.
        return min(peak_bytes(lambda: step(dispatcher)) for _ in range(5))


def test_no_more_memory_than_the_original(ranks2: RankPool, wheel: Path) -> None:
    theirs, ours = (ranks2.run(peak, wheel, name) for name in ("original", "ours"))
    assert all(mine <= other * 1.02 for mine, other in zip(ours, theirs, strict=True))
