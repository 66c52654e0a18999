"""Calls that torch_npu's meta kernels accept and its documentation does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_fx.devices.ascend.constraints import violations

GOOD_GROUPS = {"split_item": 3, "group_type": 0, "group_list_type": 0}


def _rows(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype)


WRONG: list[tuple[str, str, tuple[Any, ...], dict[str, Any], str]] = [
    (
        "inner sizes",
        "npu_grouped_matmul",
        ([_rows(6, 16)], [_rows(2, 32, 8)]),
        {"group_list": torch.zeros(2, dtype=torch.int64), **GOOD_GROUPS},
        "x has 16 features, weight takes 32",
    ),
    (
        "an int32 group_list",
        "npu_grouped_matmul",
        ([_rows(6, 16)], [_rows(2, 16, 8)]),
        {"group_list": torch.zeros(2, dtype=torch.int32), **GOOD_GROUPS},
        "group_list is int32, expected int64",
    ),
    (
        "groups",
        "npu_grouped_matmul",
        ([_rows(6, 16)], [_rows(2, 16, 8)]),
        {"group_list": torch.zeros(3, dtype=torch.int64), **GOOD_GROUPS},
        "2 weights for 3 groups",
    ),
    (
        "split_item",
        "npu_grouped_matmul",
        ([_rows(6, 16)], [_rows(2, 16, 8)]),
        {"group_list": torch.zeros(2, dtype=torch.int64), **GOOD_GROUPS, "split_item": 9},
        "split_item is 9",
    ),
    (
        "float32 in separate weights",
        "npu_grouped_matmul",
        ([_rows(6, 16, dtype=torch.float32)], [_rows(16, 8, dtype=torch.float32)] * 2),
        {"group_list": torch.zeros(2, dtype=torch.int64), **GOOD_GROUPS},
        "one stacked weight",
    ),
    ("an odd width", "npu_swiglu", (_rows(4, 7),), {}, "7 wide"),
    ("k > E", "npu_moe_gating_top_k_softmax", (_rows(4, 8), None, 9), {}, "9 of 8 experts"),
    (
        "bias of another dtype",
        "npu_moe_gating_top_k",
        (_rows(4, 8), 2),
        {"bias": _rows(8, dtype=torch.float32)},
        "bias is float32, expected bfloat16",
    ),
    (
        "probs of another dtype",
        "npu_moe_token_unpermute",
        (_rows(8, 4), torch.zeros(8, dtype=torch.int32), _rows(4, 2, dtype=torch.float32)),
        {},
        "probs is float32, expected bfloat16",
    ),
]


@pytest.mark.parametrize("name, op, args, kwargs, message", WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said(
    name: str, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    assert any(message in found for found in violations(op, args, kwargs))


ACCEPTED = ("inner sizes", "an int32 group_list", "split_item", "an odd width", "k > E")


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_meta_kernel_does_not_say_it(name: str) -> None:
    """If one of these fails torch_npu has learnt to check it."""
    _, op, args, kwargs, _ = next(wrong for wrong in WRONG if wrong[0] == name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        getattr(torch.ops.npu, op)(*fake[0], **fake[1])


def test_an_op_without_rules_is_not_emitted() -> None:
    with pytest.raises(KeyError):
        violations("npu_rotary_mul", (), {})


def test_symbolic_sizes_break_no_rule() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        count = env.create_unbacked_symint()
        torch._check(count >= 0)
        rows = torch.empty(count, 16)
        ids = torch.empty(count, 2, dtype=torch.int32)
    assert violations("npu_moe_token_permute", (rows, ids), {}) == []
    assert violations("npu_swiglu", (rows,), {}) == []
