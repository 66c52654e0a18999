"""Rows travel in the dtype that experts compute in: what is cast where, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

import moe_fx
from moe_fx.testing import rewritten

aten = torch.ops.aten
E, H, K = 4, 16, 2
_generator = torch.Generator().manual_seed(0)
GATE = torch.randn(E, H, generator=_generator)
W1, W2 = (torch.randn(E, H, H, generator=_generator) / 4 for _ in range(2))


def route(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, ids of the pairs, tokens of the pairs)."""
    weights, ids = torch.softmax(x @ GATE.t(), -1, dtype=torch.float32).topk(K)
    return weights, ids.reshape(-1), x.repeat_interleave(K, 0)


def summed(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights.reshape(-1, 1)).reshape(-1, K, H).sum(1)


def product(rows: Tensor, table: Tensor) -> Tensor:
    return torch.bmm(table, rows.unsqueeze(-1)).squeeze(-1)


def narrow_and_wide(x: Tensor) -> Tensor:
    weights, ids, rows = route(x)
    return summed(product(torch.relu(product(rows, W1[ids])), W2[ids]).float(), weights)


def read_in_float32_too(x: Tensor) -> Tensor:
    weights, ids, rows = route(x)
    return summed(product(torch.relu(product(rows, W1[ids]) + rows), W2[ids]), weights)


def sent(function: Callable[[Tensor], Tensor]) -> list[Node]:
    """What goes to the experts, and what comes back."""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        graph = rewritten(function, (torch.randn(12, H),)).graph
    starts = graph.find_nodes(op="call_function", target=torch.ops.moe_fx.all_to_all.default)
    return [start.args[0] for start in starts]


def is_cast(node: Node, dtype: torch.dtype) -> bool:
    return node.target is aten._to_copy.default and node.kwargs["dtype"] is dtype


def test_cast_before_rows_leave_and_back_when_they_are_here_again() -> None:
    there, back = sent(narrow_and_wide)
    assert is_cast(there, torch.bfloat16)
    assert not is_cast(back, torch.float32)
    (wait,) = (user for user in back.users if user.target is torch.ops.moe_fx.wait.default)
    assert [is_cast(user, torch.float32) for user in wait.users] == [True]


def test_rows_that_experts_read_in_float32_too_travel_in_it() -> None:
    there, _ = sent(read_in_float32_too)
    assert not is_cast(there, torch.bfloat16)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("strategy", ["alltoall", "padded_alltoall", "allgather"])
@pytest.mark.parametrize("function", [narrow_and_wide, read_in_float32_too])
def test_both_are_verified_for_two_ranks(
    function: Callable[[Tensor], Tensor], strategy: str, chunks: int
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(12, H, requires_grad=True)
        options = {"strategy": strategy, "verify": "always", "overlap": chunks}
        report = moe_fx.explain(function, x, options=options, ranks=2)
    assert report.declined == []
    assert [region.verified for region in report.regions] == [True]
