"""Activations read off by value: any spelling of one of the kernels', and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from moe_fx.ops.fused import ACTS, LAYOUTS, Body, split_columns
from moe_fx.passes.strategies.activation import Middle, Unfused, read_activation
from moe_fx.plan import Fused

INNER = 6


def middle_of(function: Callable[..., Tensor], widths: tuple[int, ...]) -> Middle:
    """``function`` of one or two products, traced to ATen."""
    given = [torch.randn(4, width) for width in widths]
    graph = make_fx(function)(*given).graph
    result = graph.output_node().args[0]
    assert isinstance(result, Node)
    nodes = tuple(node for node in graph.nodes if node.op == "call_function")
    products = tuple(graph.find_nodes(op="placeholder"))
    return Middle(nodes, products, result, {}, widths[0], INNER)


SPELLED: dict[str, list[Callable[[Tensor, float], Tensor]]] = {
    "silu": [
        lambda g, alpha: g * torch.sigmoid(alpha * g),
        lambda g, alpha: g / (1 + torch.exp(-alpha * g)),
        lambda g, alpha: F.silu(g) if alpha == 1.0 else F.silu(alpha * g) / alpha,
    ],
    "gelu": [
        lambda g, _: F.gelu(g),
        lambda g, _: 0.5 * g * (1 + torch.erf(g * 0.5**0.5)),
    ],
    "gelu_tanh": [
        lambda g, _: F.gelu(g, approximate="tanh"),
        lambda g, _: 0.5 * g * (1 + torch.tanh(0.7978845608028654 * (g + 0.044715 * g**3))),
    ],
    "relu": [lambda g, _: F.relu(g), lambda g, _: g.clamp(min=0), lambda g, _: g * (g > 0)],
    "relu2": [lambda g, _: F.relu(g).square(), lambda g, _: torch.relu(g) ** 2],
}


@st.composite
def activations(draw: st.DrawFn) -> tuple[Fused, int]:
    """(an activation, which of its spellings)."""
    layout = draw(st.sampled_from(LAYOUTS))
    act = draw(st.sampled_from(list(ACTS)))
    alpha = draw(st.sampled_from([1.0, 1.702, 0.5])) if act == "silu" else 1.0
    limit = draw(st.sampled_from([None, 0.25, 7.0, 300.0]))
    shift = 0.0 if layout == "single" else draw(st.sampled_from([0.0, 1.0, 0.5]))
    up_first = layout == "separate" and draw(st.booleans())
    return Fused(layout, act, alpha, limit, shift, up_first), draw(st.integers(0, 2))


@given(drawn=activations(), widened=st.booleans())
@settings(max_examples=80, deadline=None)
def test_reads_what_was_written(drawn: tuple[Fused, int], widened: bool) -> None:
    written, at = drawn
    act = SPELLED[written.act][at % len(SPELLED[written.act])]

    def function(*columns: Tensor) -> Tensor:
        if written.layout == "separate":
            g, u = reversed(columns) if written.up_first else columns
        else:
            g, u = split_columns(columns[0], written.layout)
        if widened:
            g = g.bfloat16().float()
        if written.limit is not None:
            g = g.clamp(max=written.limit)
            u = None if u is None else u.clamp(-written.limit, written.limit)
        gated = act(g, written.alpha)
        return gated if u is None else (u + written.shift) * gated

    widths = {"separate": (INNER, INNER), "single": (INNER,)}.get(written.layout, (2 * INNER,))
    found = read_activation(middle_of(function, widths))
    assert (found.layout, found.up_first) == (written.layout, written.up_first)
    columns = torch.randn(64, sum(widths), dtype=torch.float64) * 20
    spelled = {"separate": "halves_up_first" if written.up_first else "halves"}
    torch.testing.assert_close(*(_values(each, spelled, columns) for each in (found, written)))


def _values(read: Fused, spelled: dict[str, str], columns: Tensor) -> Tensor:
    layout = spelled.get(read.layout, read.layout)
    return Body(layout, read.act, read.alpha, read.limit, read.shift)(columns)


NONE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], str]] = {
    "another function": (lambda x: x.sin(), (INNER,), "aten.sin"),
    "leaky": (lambda x: F.leaky_relu(x, 1e-3), (INNER,), "aten.leaky_relu"),
    "across a row": (lambda x: x.softmax(-1), (INNER,), "no activation"),
    "across rows": (lambda x: x.relu() - x.mean(0), (INNER,), "no activation"),
    "chance": (lambda x: x.relu() * torch.rand_like(x), (INNER,), "random"),
    "gate also limited below": (
        lambda x: F.silu(x[:, :INNER].clamp(-7, 7)) * x[:, INNER:],
        (2 * INNER,),
        "no activation",
    ),
    "no gate of a half": (lambda x: x[:, :INNER].relu(), (2 * INNER,), "no activation"),
    "widths": (lambda x: x[:, :INNER].relu(), (3 * INNER,), "gives 18 columns, the last takes 6"),
    "fixed rows": (lambda x: x.reshape(4, INNER).relu(), (INNER,), "cannot be run alone"),
}


@pytest.mark.parametrize("what", NONE)
def test_what_is_none_is_named(what: str) -> None:
    function, widths, said = NONE[what]
    with pytest.raises(Unfused, match=said):
        read_activation(middle_of(function, widths))
