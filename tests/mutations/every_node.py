"""Changes to every node of a graph, by its op, its shape and what else it could read.

Numbers are those of a block with 2 of 8 experts, hidden size 64 and 12 tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import same
from tests.mutations.changes import (
    Change,
    Mutation,
    followed_by,
    followed_by_input,
    reading,
    with_args,
    with_argument,
    with_inputs_swapped,
    with_target,
    without,
)

aten = torch.ops.aten


def mutations(module: GraphModule) -> Iterator[Mutation]:
    nodes = list(module.graph.nodes)
    for at, node in enumerate(nodes):
        if node.op == "call_function" and "_assert" not in node.name:
            for label, change in (*_of_op(node), *_of_rows(node), *_of_inputs(node, nodes[:at])):
                yield Mutation(node.name, label, change)


def _of_op(node: Node) -> Iterator[tuple[str, Change]]:
    target, args = node.target, node.args
    if target is operator.getitem:
        yield "the other item", with_args(args[0], 1 - args[1])  # type: ignore[operator]
    elif target is aten.topk.default:
        yield "one more", with_argument(1, 3)
        yield "lowest", with_argument(3, False)
        yield "over tokens", with_argument(2, 0)
    elif target is aten.softmax.int:
        yield "over tokens", with_argument(1, 0)
    elif target is aten.sort.default:
        yield "descending", with_argument(2, True)
        yield "of negated ids", followed_by_input(aten.neg.default)
        yield "of ids modulo 4", followed_by_input(aten.remainder.Scalar, 4)
    elif target is aten.floor_divide.default:
        yield "by one more", with_args(args[0], args[1] + 1)  # type: ignore[operator]
        yield "remainder", with_target(aten.remainder.Scalar)
    elif target is aten.histc.default:
        yield "one bin more", with_args(args[0], 9, 0, 8)
        yield "bins from one", with_args(args[0], 8, 1, 8)
        yield "bins to E", with_args(args[0], 8, 0, 8)
        yield "wider bins", with_args(args[0], 8, 0, 15)
    elif target is aten.cumsum.default:
        yield "counts", with_args(args[0], target=aten._to_copy.default, **node.kwargs)
        yield "summed twice", followed_by((aten.cumsum.default, 0))
        yield "exclusive", followed_by((aten.roll.default, [1]))
        yield "one less", followed_by((aten.sub.Tensor, 1), (aten.clamp.default, 0))
    elif target is aten.split.Tensor:
        yield "in quarters", with_args(args[0], 16, -1)
        yield "over rows", with_args(args[0], 12, 0)
    elif target is aten.slice.Tensor:
        yield "one further", with_args(*args[:2], 1 - args[2], *args[3:])  # type: ignore[operator]
        yield "first half", with_args(args[0], 1, 0, 32)
        yield "second half", with_args(args[0], 1, 32, 64)
        yield "over rows", with_args(args[0], 0, *args[2:])
    elif target is aten.clamp.default:
        yield "tighter", with_args(args[0], -0.1, 0.2)
        yield "from above only", with_args(args[0], None, 0.1)
    elif target is aten.sum.dim_IntList:
        yield "other dim", with_args(args[0], [0])
        yield "keeps dim", with_args(*args[:2], not (len(args) > 2 and args[2]))
        yield "mean", with_target(aten.mean.dim)
        yield "largest", with_target(aten.amax.default)
        yield "over all but the first", with_args(args[0], [1, 2])
    elif target is aten.view.default and len(args[1]) > 1:  # type: ignore[arg-type]
        sizes = list(args[1])  # type: ignore[arg-type]
        yield "first two sizes swapped", with_args(args[0], [sizes[1], sizes[0], *sizes[2:]])
    elif target is aten.transpose.int:
        yield "left out", without
        yield "of the first dims", with_args(args[0], 0, 1)
    elif target is aten.arange.default:
        yield "backwards", followed_by((aten.flip.default, [0]))
        yield "from one", followed_by((aten.add.Tensor, 1), (aten.clamp.default, None, 23))
    elif target is aten.index_put.default:
        yield "accumulated", with_argument(3, True)
        yield "inverse of the inverse", followed_by((aten.argsort.default,))
    elif target is aten.repeat_interleave.self_int:
        yield "tiled", with_args(args[0], [2, 1], target=aten.repeat.default)
    elif target is aten.unsqueeze.default:
        yield "first dim", with_args(args[0], 0)
    elif target is aten.mul.Tensor:
        yield "add", with_target(aten.add.Tensor)
        yield "divide", with_target(aten.div.Tensor)
        yield "left out", without
        yield "twice", followed_by((aten.mul.Tensor, args[1]))
    elif target is aten.add.Tensor:
        yield "subtract", with_target(aten.sub.Tensor)
        yield "left out", without
        yield "twice", followed_by((aten.add.Tensor, args[1]))
    elif target is aten.div.Tensor:
        yield "multiply", with_target(aten.mul.Tensor)
        yield "left out", without
    elif target in (aten.silu.default, aten.sigmoid.default, aten._to_copy.default):
        yield "left out", without
        yield "tanh", with_args(args[0], target=aten.tanh.default)
    elif target is aten.gather.default:
        yield "of tokens", with_argument(1, 0)
    elif target is aten.masked_fill.Scalar:
        yield "with one", with_argument(2, 1.0)
    elif target is aten.bmm.default:
        yield "left out", without


def _of_rows(node: Node) -> Iterator[tuple[str, Change]]:
    """Changes to any value that has more than one dim, or counts pairs or experts."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dim() == 0 or node.target is aten.linear.default:
        return
    yield "order reversed", followed_by((aten.flip.default, [0]))
    if not val.dtype.is_floating_point:
        yield "one more", followed_by((aten.add.Tensor, 1), (aten.clamp.default, 0, _top(val)))
        yield (
            "as one or nothing",
            followed_by((aten._to_copy.default,), (aten.clamp.default, None, 1)),
        )
    elif val.dim() > 1:
        yield "last dim reversed", followed_by((aten.flip.default, [-1]))
        yield "running sum over rows", followed_by((aten.cumsum.default, 0))
        yield "softmax over features", followed_by((aten.softmax.int, -1))


def _top(val: Tensor) -> int:
    return 7 if val.dim() == 2 or same(val.shape[0], 8) else 23


def _of_inputs(node: Node, earlier: list[Node]) -> Iterator[tuple[str, Change]]:
    """Two inputs swapped, or one replaced by another earlier value of its shape and type."""
    if len(node.args) > 1 and _kind(node.args[0]) == _kind(node.args[1]) is not None:
        yield "inputs swapped", with_inputs_swapped
    for source in node.all_input_nodes:
        for other in earlier:
            if other is not source and _kind(other) == _kind(source) is not None:
                yield f"reads {other.name} for {source.name}", reading(other.name, source.name)


def _kind(node: Any) -> tuple[Any, ...] | None:
    val = node.meta.get("val") if isinstance(node, Node) else None
    return (tuple(map(str, val.shape)), val.dtype) if isinstance(val, Tensor) else None
