"""Decomposed spellings of one op become that op; chains that only look alike stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moe_fx.options import Options
from moe_fx.passes import Context, Normalise
from moe_fx.report import Report
from tests.passes.graphs import op_names, relative_error, tokens

aten = torch.ops.aten
prims = torch.ops.prims

X = tokens(6, 8)
WEIGHT, BIAS = tokens(4, 8, seed=2), tokens(4, seed=3)


def normalised(function: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """The ops left, getitem apart; asserts that the values and the given graph stay."""
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    text = graph.code
    context = Context(options=Options(), report=Report())
    result = Normalise()(graph, context).module
    assert graph.code == text
    assert relative_error(function(*inputs), result(*inputs)) <= 1e-6
    check_origin(graph, result, context)
    return op_names(result)


def check_origin(graph: GraphModule, result: GraphModule, context: Context) -> None:
    """Every node stands for one of equal shape and dtype in the given graph."""
    given = set(graph.graph.nodes)
    for node in result.graph.nodes:
        old = context.origin[node]
        assert old in given
        if isinstance(node.meta.get("val"), Tensor):
            assert node.meta["val"].shape == old.meta["val"].shape


def silu(x: Tensor, one: float = 1.0, factor: float = 1.0) -> Tensor:
    return x / (torch.exp(torch.neg(x * factor if factor != 1.0 else x)) + one)


def softmax(x: Tensor, dims: tuple[int, int] = (-1, -1)) -> Tensor:
    largest, total = dims
    powers = (x - x.amax(largest, keepdim=True)).exp()
    return powers / powers.sum(total, keepdim=True)


def softmax_in_prims(x: Tensor) -> Tensor:
    rows = x.shape[0]
    largest = prims.broadcast_in_dim(prims.amax(x, [1]), [rows, 1], [0])
    powers = prims.exp(prims.sub(x, prims.broadcast_in_dim(largest, [rows, 8], [0, 1])))
    total = prims.broadcast_in_dim(prims.sum(powers, [1]), [rows, 1], [0])
    return prims.div(powers, prims.broadcast_in_dim(total, [rows, 8], [0, 1]))


def repeated(x: Tensor, at: int = 1) -> Tensor:
    sizes = list(x.shape)
    sizes.insert(at, 3)
    return aten.view(aten.clone(x.unsqueeze(at).expand(sizes)), [3 * x.shape[0], 8])


def inverse(perm: Tensor, put: Any = aten.index_put) -> Tensor:
    return put(aten.empty([6], dtype=torch.int64), [perm], prims_iota(6))


def prims_iota(length: int, start: int = 0, step: int = 1) -> Tensor:
    device = torch.device("cpu")
    return prims.iota(
        length, start=start, step=step, dtype=torch.int64, device=device, requires_grad=False
    )


PERM = torch.tensor([3, 0, 5, 1, 4, 2])
ONE_OP: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], list[str]]] = {
    "softmax": (lambda x: softmax(x), (X,), ["aten.softmax.int"]),
    "softmax over dim 0": (lambda x: softmax(x, (0, 0)), (X,), ["aten.softmax.int"]),
    "softmax in prims": (softmax_in_prims, (X,), ["aten.softmax.int"]),
    "_softmax": (lambda x: aten._softmax(x, 1, False), (X,), ["aten.softmax.int"]),
    "silu": (lambda x: silu(x), (X,), ["aten.silu.default"]),
    "sigmoid": (lambda x: (1 + (-x).exp()).reciprocal(), (X,), ["aten.sigmoid.default"]),
    "repeat": (lambda x: repeated(x), (X,), ["aten.repeat_interleave.self_int"]),
    "transpose": (lambda x: x.permute(1, 0), (X,), ["aten.transpose.int"]),
    "t": (lambda x: aten.t(x), (X,), ["aten.transpose.int"]),
    "linear": (
        lambda x, w: aten.mm(x, aten.permute(w, [1, 0])),
        (X, WEIGHT),
        ["aten.linear.default"],
    ),
    "linear with bias": (
        lambda x, w, b: aten.addmm(b, x, aten.permute(w, [1, 0])),
        (X, WEIGHT, BIAS),
        ["aten.linear.default"],
    ),
    "clamp": (lambda x: aten.clamp_max(x, 0.5), (X,), ["aten.clamp.default"]),
    "cast": (
        lambda x: prims.convert_element_type(x, torch.float64),
        (X,),
        ["aten._to_copy.default"],
    ),
    "floor divide": (
        lambda p: aten.div(p, 2, rounding_mode="floor"),
        (PERM,),
        ["aten.floor_divide.default"],
    ),
    "arange": (lambda p: p + prims_iota(6), (PERM,), ["aten.arange.default", "aten.add.Tensor"]),
    "index_put_ into a fresh buffer": (
        lambda p: inverse(p, aten.index_put_),
        (PERM,),
        ["aten.empty.memory_format", "aten.arange.default", "aten.index_put.default"],
    ),
}


@pytest.mark.parametrize("name", ONE_OP)
def test_a_decomposed_op_is_found_again(name: str) -> None:
    function, inputs, ops = ONE_OP[name]
    assert normalised(function, *inputs) == ops


def index_put_into_a_shared_buffer(perm: Tensor) -> Tensor:
    buffer = aten.zeros([6], dtype=torch.int64)
    view = buffer.view(2, 3)
    aten.index_put_(buffer, [perm], prims_iota(6))
    return view + 1


LOOK_ALIKES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "the sum is over another dim than the maximum": (
        lambda x: softmax(x, (-1, 0)),
        (X,),
        "softmax",
    ),
    "the maximum of something else is subtracted": (
        lambda x: (p := (x - x.exp().amax(-1, keepdim=True)).exp()) / p.sum(-1, keepdim=True),
        (X,),
        "softmax",
    ),
    "2 + exp(-x)": (lambda x: silu(x, one=2.0), (X,), "silu"),
    "x / (1 + exp(-1.7 x))": (lambda x: silu(x, factor=1.7), (X,), "silu"),
    "2 / (1 + exp(-x))": (lambda x: 2 * (1 + (-x).exp()).reciprocal() + x, (X,), "silu"),
    "tokens repeated as a whole": (lambda x: repeated(x, at=0), (X,), "repeat_interleave"),
    "as many tokens as repeats, repeated as a whole": (
        lambda x: repeated(x, at=0),
        (X[:3],),
        "repeat_interleave",
    ),
    "a permute of three dims": (lambda x: x.view(6, 4, 2).permute(1, 2, 0), (X,), "transpose"),
    "mm with a matrix as it is": (
        lambda x, w: aten.mm(x, w),
        (WEIGHT, X.t().contiguous()),
        "linear",
    ),
    "iota from 1": (lambda p: p + prims_iota(6, start=1), (PERM,), "arange"),
    "index_put_ into a buffer that is read": (
        index_put_into_a_shared_buffer,
        (PERM,),
        "put.default",
    ),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_only_looks_alike_stays(name: str) -> None:
    function, inputs, op = LOOK_ALIKES[name]
    assert not any(op in found for found in normalised(function, *inputs))


def test_links_of_a_chain_that_others_read_stay() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        denominator = torch.exp(torch.neg(x)) + 1
        return x / denominator, denominator

    ops = normalised(both, X)
    assert set(ops) == {
        "aten.neg.default",
        "aten.exp.default",
        "aten.add.Tensor",
        "aten.silu.default",
    }
