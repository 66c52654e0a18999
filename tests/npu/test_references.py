"""Reference kernels are what torch_npu's schemas and meta kernels say: shapes, dtypes, aliases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_fx.devices.ascend import reference
from moe_fx.devices.ascend.constraints import checked_ops

T, K, E, H = 6, 2, 4, 8
ROWS = torch.randn(T * K, H)
IDS = torch.randint(0, E, (T, K), dtype=torch.int32)
MAP = torch.randperm(T * K).to(torch.int32)
PROBS = torch.rand(T, K)
ENDS = torch.tensor([3, 3, 7, 12])

Call = tuple[tuple[Any, ...], dict[str, Any]]
CALLS: dict[str, list[Call]] = {
    "npu_moe_token_permute": [
        ((torch.randn(T, H), IDS), {}),
        ((torch.randn(T, H), IDS, 7), {}),
        ((torch.randn(T, H).bfloat16(), IDS.long()), {}),
    ],
    "npu_moe_token_unpermute": [((ROWS, MAP, PROBS), {}), ((ROWS, MAP), {})],
    "npu_moe_token_permute_grad_v2": [((ROWS, MAP, T, torch.float32, K), {})],
    "npu_moe_token_unpermute_grad": [((ROWS, torch.randn(T, H), MAP, PROBS), {})],
    "npu_grouped_matmul": [
        (
            ([ROWS], [torch.randn(E, H, 5)]),
            {"group_list": ENDS, "split_item": 3, "group_type": 0, "group_list_type": 0},
        ),
        (
            ([ROWS], [torch.randn(H, 5) for _ in range(E)]),
            {"group_list": ENDS, "split_item": 3, "group_type": 0, "group_list_type": 0},
        ),
        (
            ([ROWS.t()], [torch.randn(T * K, 5)]),
            {"group_list": ENDS, "split_item": 3, "group_type": 2, "group_list_type": 0},
        ),
    ],
    "npu_swiglu": [((ROWS,), {}), ((ROWS.bfloat16(), -1), {})],
    "npu_moe_gating_top_k_softmax": [((torch.randn(T, E), None, K), {})],
    "npu_moe_gating_top_k": [
        ((torch.randn(T, 16), K), {}),
        (
            (torch.randn(T, 16), K),
            {
                "bias": torch.randn(16),
                "k_group": 2,
                "group_count": 4,
                "group_select_mode": 1,
                "norm_type": 1,
                "routed_scaling_factor": 2.5,
            },
        ),
    ],
    "npu_moe_init_routing_v2": [
        (
            (torch.randn(T, H), IDS),
            {
                "active_num": -1,
                "expert_num": E,
                "expert_tokens_num_type": 1,
                "expert_tokens_num_flag": True,
                "active_expert_range": own,
                "row_idx_type": 0,
            },
        )
        for own in ([0, E], [1, 3])
    ],
    "npu_moe_finalize_routing": [
        ((ROWS, None, None, None, PROBS, MAP, None, 2, K), {}),
        ((ROWS, None, None, None, None, MAP, None, 2, K), {}),
    ],
}
CASES = [(name, *call) for name, calls in CALLS.items() for call in calls]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    reference.register()


def test_every_op_that_has_rules_is_called_here() -> None:
    """But for MC2's, which need a group: `test_values.py` runs them."""
    mc2 = {"npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"}
    assert set(CALLS) == checked_ops() - mc2


@pytest.mark.parametrize("name, args, kwargs", CASES)
def test_schema_and_meta(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    op = getattr(torch.ops.npu, name).default
    torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_permute_then_unpermute_is_the_weighted_sum_of_the_same_tokens() -> None:
    tokens = torch.randn(T, H)
    rows, row_map = torch.ops.npu.npu_moe_token_permute(tokens, IDS)
    assert (IDS.flatten().sort(stable=True).values.diff() >= 0).all()
    back = torch.ops.npu.npu_moe_token_unpermute(rows, row_map, PROBS)
    torch.testing.assert_close(back, tokens * PROBS.sum(1, keepdim=True))


def test_both_ways_to_route_are_the_same_rows() -> None:
    tokens = torch.randn(T, H)
    rows, row_map = torch.ops.npu.npu_moe_token_permute(tokens, IDS)
    routed, where, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        tokens,
        IDS,
        active_num=-1,
        expert_num=E,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, E],
        row_idx_type=0,
    )
    assert torch.equal(rows, routed) and torch.equal(row_map, where)
    assert torch.equal(counts, torch.bincount(IDS.flatten(), minlength=E))
