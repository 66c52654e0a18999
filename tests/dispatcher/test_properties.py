"""Any numbers of tokens, experts, ranks, any skew: as one dense layer (real ranks)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_fx
from tests.dispatcher.layers import Weights, tokens_of

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def error(
    rank: int,
    world: int,
    lengths: tuple[int, ...],
    local: int,
    top_k: int,
    skew: float,
    dtype: torch.dtype,
    phases: bool,
) -> float:
    experts = local * world
    weights = Weights.make(experts, dtype=dtype)
    x, probs, ids = tokens_of(rank, lengths[rank], experts, top_k, dtype=dtype, skew=skew)
    config = moe_fx.MoEDispatcherConfig(num_local_experts=local)
    d = moe_fx.MoEAlltoAllSeqOverLapDispatcher(config)
    own = weights.own(rank * local, local)
    with torch.no_grad():
        if phases:
            d.preprocess_and_permute1(x, probs, ids)
            d.dispatch_alltoall()
            d.unpermute1(own.experts(*d.permute2()))
            d.combine_alltoall()
            out = d.unpermute2()
        else:
            _, rows, counts = d.token_permutation(x, probs, ids)
            out, _ = d.token_unpermutation(own.experts(rows, counts))
        for name in ("up", "down", "shared"):
            setattr(weights, name, getattr(weights, name).double())
        expected = weights.dense(x.double(), probs.double(), ids)
    assert out.dtype == dtype and out.shape == x.shape
    if not x.numel():
        return 0.0
    return float((out.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_equals_a_dense_layer(moe_fx_ranks: Any, world: int, data: st.DataObject) -> None:
    local = data.draw(st.integers(1, 5), "local experts")
    top_k = data.draw(st.integers(1, min(4, local * world)), "k")
    lengths = tuple(data.draw(st.lists(st.integers(0, 9), min_size=world, max_size=world), "T"))
    skew = data.draw(st.sampled_from([0.0, 0.5, 20.0]), "skew")
    dtype = data.draw(st.sampled_from(list(_TOLERANCE)), "dtype")
    phases = data.draw(st.booleans(), "phases")
    found = moe_fx_ranks(world).run(error, world, lengths, local, top_k, skew, dtype, phases)
    assert max(found) <= _TOLERANCE[dtype]
