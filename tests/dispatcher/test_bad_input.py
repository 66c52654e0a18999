"""What cannot be dispatched is an error on every rank, in time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_fx
from moe_fx.testing import RankPool
from tests.dispatcher.layers import tokens_of

EXPERTS, TOP_K = 8, 3
IN_TIME = 10.0

Given = tuple[Tensor, Tensor, Tensor]


def _id_too_large(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs, ids.index_fill(0, torch.tensor([1]), EXPERTS)


def _id_negative(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs, ids.index_fill(0, torch.tensor([1]), -3)


def _flat_map(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs, ids.reshape(-1)


def _flat_probs(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs.reshape(-1), ids


def _other_k(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs[:, :2], ids


def _other_tokens(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x[:-1], probs, ids


def _float_ids(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs, ids.float()


def _float8(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x.to(torch.float8_e4m3fn), probs, ids


def _complex(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x.to(torch.complex64), probs, ids


def _integer_probs(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x, probs.long(), ids


def _one_dimensional(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x[0], probs, ids


def _wider(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return torch.cat([x, x], 1), probs, ids


def _other_dtype(x: Tensor, probs: Tensor, ids: Tensor) -> Given:
    return x.float(), probs, ids


BAD: dict[str, tuple[Callable[..., Given], str, str]] = {
    "an id past the last expert": (_id_too_large, "rank 1: an expert id is 8", "rank 1: an expert"),
    "a negative id": (_id_negative, "rank 1: an expert id is -3", "rank 1: an expert id is -3"),
    "a map that is not 2-D": (_flat_map, "Expected 2D tensor for routing map", "rank 1 raised"),
    "probs that are not 2-D": (_flat_probs, "Expected 2D tensor for probs", "rank 1 raised"),
    "probs of another shape": (_other_k, r"probs has shape \(6, 2\)", "rank 1 raised"),
    "another number of tokens": (_other_tokens, "has 6 tokens, hidden_states 5", "rank 1 raised"),
    "ids that are floats": (_float_ids, "expected expert ids", "rank 1 raised"),
    "float8 tokens": (_float8, "float8_e4m3fn cannot be dispatched", "rank 1 raised"),
    "complex tokens": (_complex, "complex64 cannot be dispatched", "rank 1 raised"),
    "probs that are integers": (_integer_probs, "expected a floating dtype", "rank 1 raised"),
    "one token as a vector": (_one_dimensional, r"expected \[..., tokens, features\]", "rank 1"),
    "more features": (_wider, "rank 1 has 32 features", "rank 1 has 32 features"),
    "another dtype": (_other_dtype, "float32", "float32"),
}


def attempt(rank: int, name: str, phases: bool) -> tuple[str, float, float]:
    """(what was raised, seconds, error of a good step afterwards)."""
    config = moe_fx.MoEDispatcherConfig(num_local_experts=EXPERTS // dist.get_world_size())
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)
    good = tokens_of(rank, 6, EXPERTS, TOP_K)
    given = BAD[name][0](*good) if rank == 1 else good
    begin = d.preprocess_and_permute1 if phases else d.token_permutation
    start, said = time.perf_counter(), ""
    try:
        begin(*given)
        d.dispatch_alltoall()
    except moe_fx.BadInput as error:
        said = str(error)
    seconds = time.perf_counter() - start
    x, probs, _ = good
    _, rows, _ = d.token_permutation(*good)
    out, _ = d.token_unpermutation(rows)
    return said, seconds, float((out - x * probs.sum(1, keepdim=True)).abs().max())


@pytest.mark.parametrize("phases", [False, True], ids=["whole", "phases"])
@pytest.mark.parametrize("name", BAD)
def test_every_rank_says_what_is_wrong(ranks2: RankPool, name: str, phases: bool) -> None:
    _, own, others = BAD[name]
    (first, seconds, error), (second, more_seconds, other_error) = ranks2.run(attempt, name, phases)
    assert re.search(others, first) and re.search(own, second)
    assert max(seconds, more_seconds) < IN_TIME
    assert max(error, other_error) <= 1e-14, "the ranks go on in step"


def differing(rank: int) -> tuple[str, float]:
    config = moe_fx.MoEDispatcherConfig(num_local_experts=4 if rank == 0 else 2)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)
    start = time.perf_counter()
    try:
        d.token_permutation(*tokens_of(rank, 6, d.num_experts, 2))
    except moe_fx.BadInput as error:
        return str(error), time.perf_counter() - start
    return "", 0.0


def absent(rank: int) -> tuple[str, float]:
    if rank == 1:
        return "", 0.0
    config = moe_fx.MoEDispatcherConfig(num_local_experts=3)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config, agree_timeout=3.0)
    start = time.perf_counter()
    try:
        d.token_permutation(*tokens_of(rank, 6, d.num_experts, 2))
    except moe_fx.RanksDiffer as error:
        return str(error), time.perf_counter() - start
    return "", 0.0


def test_ranks_that_count_experts_differently_are_told_so(ranks2: RankPool) -> None:
    for said, seconds in ranks2.run(differing):
        assert "of torch.float64 for 8 experts" in said and "for 4 experts" in said
        assert seconds < IN_TIME


def test_a_rank_that_never_comes_is_no_hang() -> None:
    with RankPool(2) as pool:
        (said, seconds), _ = pool.run(absent)
        assert "waited 3 s for rank(s) [1]" in said and seconds < IN_TIME


def alone(case: str) -> Any:
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(
        moe_fx.MoEDispatcherConfig(num_local_experts=EXPERTS)
    )
    return d.token_permutation(*BAD[case][0](*tokens_of(0, 6, EXPERTS, TOP_K)))


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("more features", "another dtype")])
def test_so_does_one_process_alone(name: str) -> None:
    pattern = BAD[name][1].replace("rank 1", "rank 0")
    with pytest.raises(moe_fx.BadInput, match=pattern):
        alone(name)


def test_a_result_with_other_rows_is_refused() -> None:
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(
        moe_fx.MoEDispatcherConfig(num_local_experts=EXPERTS)
    )
    _, rows, _ = d.token_permutation(*tokens_of(0, 6, EXPERTS, TOP_K))
    with pytest.raises(moe_fx.BadInput, match="one row for each of the 18"):
        d.token_unpermutation(rows[:-1])


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no experts": ({"num_local_experts": 0}, "at least one expert"),
    "experts that do not divide": ({"num_local_experts": 4, "num_moe_experts": 9}, "4 \\* 1 = 4"),
    "groups": ({"num_local_experts": 8, "num_groups": 3}, "a divisor of 8 experts"),
    "groups selected": (
        {"num_local_experts": 8, "num_groups": 4, "group_topk": 5},
        "1 to 4 groups",
    ),
    "k over groups": (
        {"num_local_experts": 8, "num_groups": 4, "group_topk": 1, "moe_router_topk": 3},
        "the 2 experts of 1 groups",
    ),
    "bias": ({"num_local_experts": 8, "expert_bias": torch.ones(4)}, r"shape \(8,\)"),
    "capacity": ({"num_local_experts": 8, "moe_expert_capacity_factor": 0.0}, "above 0"),
    "padding to none": (
        {"num_local_experts": 8, "moe_pad_expert_input_to_capacity": True},
        "pads to the capacity",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_that_cannot_be_is_refused(name: str) -> None:
    fields, said = CONFIGURATIONS[name]
    with pytest.raises(moe_fx.ConfigurationError, match=said):
        moe_fx.MoEAlltoAllSeqOverLapDispatcher(moe_fx.MoEDispatcherConfig(**fields))
