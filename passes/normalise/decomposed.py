"""Chains of ops that a compiler makes of one op, found again: softmax, silu, sigmoid, repeat.

Contract. A function takes the chain's last node and returns the op that gives the same value from
the chain's inputs, or None. It looks at nothing but the chain, so the ops in between may have other
users; a chain whose inputs, dims or constants are not exactly those of the op is left alone.

Pseudo-code::

    softmax(x, d)               div(e, sum(e, d))      where e = exp(sub(x, amax(x, d)))
    silu(x)                     div(x, 1 + exp(-x))
    sigmoid(x)                  div(1, 1 + exp(-x))    or reciprocal(1 + exp(-x))
    repeat_interleave(x, k, 0)  reshape(expand(unsqueeze(x, 1), [T, k, ...]), [T * k, ...])

Rejects: reductions over several dims or without the dim kept, casts inside a chain, an expand along
any other dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, VIEWS, argument, same, shape, value

aten = torch.ops.aten

Spelling = tuple[Any, tuple[Any, ...], dict[str, Any]]


def softmax(node: Node) -> Spelling | None:
    powers, total = node.args
    shifted = _argument_of(powers, aten.exp.default)
    dim = _reduced(total, aten.sum.dim_IntList, powers)
    if dim is None or shifted is None or shifted.target is not aten.sub.Tensor or shifted.kwargs:
        return None
    logits, largest = shifted.args
    if _reduced(largest, aten.amax.default, logits) != dim:
        return None
    return aten.softmax.int, (logits, dim), {}


def silu(node: Node) -> Spelling | None:
    x, denominator = node.args
    if not isinstance(x, Node) or _one_plus_exp_of_minus(denominator) is not x:
        return None
    return aten.silu.default, (x,), {}


def sigmoid(node: Node) -> Spelling | None:
    if node.target is not aten.reciprocal.default and node.args[0] != 1:
        return None
    x = _one_plus_exp_of_minus(node.args[-1])
    return None if x is None else (aten.sigmoid.default, (x,), {})


def repeat(node: Node) -> Spelling | None:
    expanded = node.args[0]
    while isinstance(expanded, Node) and expanded.target in ELEMENTWISE_COPIES:
        if value(expanded).dtype != value(expanded.args[0]).dtype:
            return None
        expanded = expanded.args[0]
    if not isinstance(expanded, Node) or expanded.target is not aten.expand.default:
        return None
    single = expanded.args[0]
    if not isinstance(single, Node) or single.target is not aten.unsqueeze.default:
        return None
    tokens, sizes = single.args[0], shape(expanded)
    if single.args[1] != 1 or not isinstance(sizes[1], int):
        return None
    times, before = sizes[1], shape(tokens)
    wanted = (before[0] * times, *before[1:])
    kept = all(same(a, b) for a, b in zip(sizes[2:], before[1:], strict=True))
    if not kept or not same(sizes[0], before[0]) or len(shape(node)) != len(wanted):
        return None
    if not all(same(a, b) for a, b in zip(shape(node), wanted, strict=True)):
        return None
    return aten.repeat_interleave.self_int, (tokens, times, 0), {}


CHAINS: dict[Any, tuple[Callable[[Node], Spelling | None], ...]] = {
    aten.div.Tensor: (softmax, silu, sigmoid),
    aten.reciprocal.default: (sigmoid,),
    **dict.fromkeys(VIEWS, (repeat,)),
}


def _argument_of(node: Any, op: Any) -> Node | None:
    """``x`` of ``node = op(x)``."""
    if not isinstance(node, Node) or node.target is not op or not isinstance(node.args[0], Node):
        return None
    return node.args[0]


def _one_plus_exp_of_minus(node: Any) -> Node | None:
    """``x`` of ``1 + exp(-x)``."""
    if not isinstance(node, Node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    powers = [n for n in node.args if isinstance(n, Node)]
    constants = [n for n in node.args if not isinstance(n, Node)]
    if len(powers) != 1 or constants != [1]:
        return None
    negated = _argument_of(powers[0], aten.exp.default)
    return None if negated is None else _argument_of(negated, aten.neg.default)


def _reduced(node: Any, op: Any, source: Any) -> int | None:
    """The dim of ``node = op(source, [dim], keepdim=True)``, also if the dim was put back later or
    ``node`` was expanded to the sizes of ``source``."""
    if isinstance(node, Node) and node.target is aten.expand.default:
        node = node.args[0]
    put_back = None
    if isinstance(node, Node) and node.target is aten.unsqueeze.default:
        put_back = argument(node, 1, "dim") % len(shape(node))
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not op or node.args[0] is not source:
        return None
    dims = argument(node, 1, "dim")
    if len(dims) != 1 or argument(node, 3, "dtype") is not None:
        return None
    dim: int = dims[0] % len(shape(source))
    keeps = argument(node, 2, "keepdim", False)
    return dim if (put_back is None if keeps else put_back == dim) else None
