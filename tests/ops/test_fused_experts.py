"""``fused_experts``: equal to the experts one by one, and its gradients to autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moe_fx  # noqa: F401  (registers the ops)
from moe_fx.ops.fused import ACTS, LAYOUTS, Body

ops = torch.ops.moe_fx


def one_by_one(
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    gate_up: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_up_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    *body: Any,
) -> Tensor:
    """The formula of the op's docstring, read literally."""
    act, dtype = Body(*body[:-1]), body[-1]
    out = []
    for t, token in enumerate(tokens):
        total = 0 * token.sum().expand(down.shape[2])
        for k, e in enumerate(ids[t].tolist()):
            if not 0 <= e < len(down):
                continue
            columns = token @ gate_up[e]
            if gate_up_bias is not None:
                columns = columns + gate_up_bias[e]
            if up is not None:
                other = token @ up[e]
                columns = torch.cat([columns, other if up_bias is None else other + up_bias[e]])
            row = act(columns[None])[0] @ down[e]
            if down_bias is not None:
                row = row + down_bias[e]
            total = total + row * (1 if weights is None else weights[t, k])
        out.append(total)
    none = tokens @ gate_up[0, :, :1].expand(-1, down.shape[2])
    return torch.stack(out).to(dtype) if out else none


def layer(
    tokens: int = 5,
    top_k: int = 2,
    experts: int = 4,
    hidden: int = 8,
    inner: int = 12,
    layout: str = "halves",
    act: str = "silu",
    biased: bool = False,
    clamped: bool = False,
    weighted: bool = True,
    missing: bool = False,
    transposed: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Any]:
    """The op's arguments. transposed: tables as transformers keeps them, ``[E, N, H]``."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    def table(k: int, n: int) -> Tensor:
        made = normal(experts, n, k).transpose(1, 2) if transposed else normal(experts, k, n)
        return made * k**-0.5

    columns = inner if layout in ("separate", "single") else 2 * inner
    separate = layout == "separate"
    ids = torch.rand(tokens, experts, generator=random).topk(top_k).indices
    if missing:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -1)
    return [
        normal(tokens, hidden),
        ids,
        torch.rand(tokens, top_k, generator=random).to(dtype) if weighted else None,
        table(hidden, columns),
        table(hidden, inner) if separate else None,
        table(inner, hidden),
        normal(experts, columns) if biased else None,
        normal(experts, inner) if biased and separate else None,
        normal(experts, hidden) if biased else None,
        layout,
        act,
        1.702 if clamped and act == "silu" else 1.0,
        0.7 if clamped else None,
        1.0 if clamped else 0.0,
        dtype,
    ]


layers = st.builds(
    layer,
    tokens=st.integers(0, 7),
    top_k=st.integers(1, 3),
    experts=st.integers(3, 5),
    layout=st.sampled_from(LAYOUTS),
    act=st.sampled_from(list(ACTS)),
    biased=st.booleans(),
    clamped=st.booleans(),
    weighted=st.booleans(),
    missing=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)


@given(arguments=layers)
@settings(max_examples=60, deadline=None)
def test_values(arguments: list[Any]) -> None:
    expected = one_by_one(*arguments)
    torch.testing.assert_close(ops.fused_experts(*arguments), expected)
    torch.testing.assert_close(ops.fused_experts_training(*arguments)[0], expected)


@given(arguments=layers)
@settings(max_examples=60, deadline=None)
def test_gradients(arguments: list[Any]) -> None:
    inputs = [each for each in arguments if isinstance(each, Tensor) and each.is_floating_point()]
    leaves = [each.requires_grad_() for each in inputs]
    cotangent = torch.randn_like(one_by_one(*arguments))
    (one_by_one(*arguments) * cotangent).sum().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    (ops.fused_experts_training(*arguments)[0] * cotangent).sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        torch.testing.assert_close(leaf.grad, grad)


def test_gradients_have_their_tables_layout() -> None:
    arguments = layer(transposed=True)
    tables = [arguments[3].requires_grad_(), arguments[5].requires_grad_()]
    ops.fused_experts_training(*arguments)[0].sum().backward()
    for table in tables:
        assert table.grad is not None
        assert table.grad.stride() == table.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    arguments = layer(layout=layout, biased=True, dtype=torch.float32)
    torch.library.opcheck(ops.fused_experts.default, arguments)
    arguments[0].requires_grad_()
    torch.library.opcheck(ops.fused_experts_training.default, arguments)
