"""Lowered graphs, run on CPU by kernels of torch_npu's documented semantics, on two real ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_fx.devices.ascend import reference
from moe_fx.testing import RankPool
from tests.npu.ranks import compared

EXACT = 1e-5
STATIC, EVEN, RAGGED = [[9], [9]], [[9, 4], [9, 4]], [[9, 3], [5, 8]]
GROUPED = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 1},
    "deepseek_v3": {"num_hidden_layers": 1, **GROUPED},
}
CASES = [
    ("eager", "qwen3_moe", "alltoall", 2),
    ("eager", "deepseek_v3", "padded_alltoall", 2),
    ("npugraph_ex", "qwen3_moe", "allgather", 2),
    ("npugraph_ex", "deepseek_v3", "alltoall", 2),
    ("torchair", "qwen3_moe", "alltoall", 1),
    ("torchair", "deepseek_v3", "allgather", 2),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("target, kind, strategy, chunks", CASES)
def test_models_compute_what_eager_computes(
    ranks2: RankPool, target: str, kind: str, strategy: str, chunks: int, dynamic: bool
) -> None:
    counts = STATIC if not dynamic else RAGGED if strategy == "alltoall" else EVEN
    options = {"strategy": strategy, "overlap": chunks}
    run = partial(compared, fields=FIELDS[kind])
    for result in ranks2.run(run, kind, target, counts, options):
        assert result.declined == []
        assert max(result.errors) <= EXACT
        assert result.graphs == 1
        emitted = {op for _, to, _ in result.lowered for op in to}
        gating = "npu.npu_moe_gating_top_k" + "_softmax" * (kind == "qwen3_moe")
        assert {"npu.npu_grouped_matmul", "npu.npu_swiglu", gating} <= emitted


@pytest.mark.parametrize("strategy", ["alltoall", "allgather"])
@pytest.mark.parametrize("kind", FIELDS)
def test_training_has_the_gradients_of_eager(ranks2: RankPool, kind: str, strategy: str) -> None:
    options = {"strategy": strategy, "overlap": 2}
    two_layers = {**FIELDS[kind], "num_hidden_layers": 2}
    run = partial(compared, gradients=True, fields=two_layers)
    results = ranks2.run(run, kind, "eager", STATIC, options)
    for result in results:
        assert max(result.errors) <= EXACT
        assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}
        assert any("grad" in op for _, to, _ in result.lowered for op in to)


@pytest.mark.parametrize("counts", [STATIC, RAGGED], ids=["static", "dynamic"])
@pytest.mark.parametrize("target", ["eager", "npugraph_ex", "torchair"])
def test_the_eager_dispatcher_computes_what_eager_computes(
    ranks2: RankPool, target: str, counts: Any
) -> None:
    options = {"overlap": 1 if target == "torchair" else 2}
    for result in ranks2.run(compared, "dispatcher", target, counts, options):
        assert result.declined == []
        assert max(result.errors) <= EXACT
        assert "npu.npu_grouped_matmul" in {op for _, to, _ in result.lowered for op in to}


@pytest.mark.parametrize("kind", FIELDS)
def test_mc2_computes_what_eager_computes(ranks2: RankPool, kind: str) -> None:
    """In float32 by the dialect's op, in bfloat16, which MC2 takes, by its own."""
    for dtype, tolerance in ((torch.float32, EXACT), (torch.bfloat16, 5e-2)):
        run = partial(compared, dtype=dtype, fields=FIELDS[kind])
        results = ranks2.run(run, kind, "npugraph_ex", EVEN, {"strategy": "mc2"})
        for result in results:
            assert result.declined == []
            assert max(result.errors) <= tolerance
            own = {op for _, to, _ in result.lowered for op in to if "distribute" in op}
            assert bool(own) == (dtype == torch.bfloat16)


def mc2_checked(rank: int) -> None:
    reference.register()
    group = dist.group.WORLD
    assert group is not None
    tokens, ids = torch.randn(4, 32).bfloat16(), torch.randint(8, (4, 1), dtype=torch.int32)
    place = (group.group_name, 2, rank, 8)
    checks = ("test_schema", "test_faketensor")
    dispatch = torch.ops.npu.npu_moe_distribute_dispatch_v2.default
    torch.library.opcheck(dispatch, (tokens, ids, *place), test_utils=checks)
    rows, _, assist, _, ends, *_ = dispatch(tokens, ids, *place)
    combine = torch.ops.npu.npu_moe_distribute_combine_v2.default
    given = (rows, ids, assist, ends, torch.rand(4, 1), *place)
    torch.library.opcheck(combine, given, test_utils=checks)


def test_the_reference_of_mc2_is_what_schema_and_meta_say(ranks2: RankPool) -> None:
    ranks2.run(mc2_checked)
