"""Normalise: one spelling for things that have several.

Contract. Works on a copy, so a graph in which nothing is found leaves as it came. Computes the same
values, up to rounding. Afterwards recognisers meet one op per meaning, whether the graph was
captured before or after decomposition, and no metadata assertions (they would keep replaced nodes
alive).
``context.origin`` says which captured node each node of the copy stands for: it has the same value.

Pseudo-code::

    copy the graph
    for node: erase it if it is a metadata assertion, else apply SPELLINGS[node.target]
    for node: if it ends a chain that one op was decomposed into (`decomposed.py`), make it that op
    erase what only those chains read
    read past masks of ids that no selection gives (`id_bounds.py`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_fx.compat import AUTOGRAD_COLLECTIVES
from moe_fx.graph.contraction import parsed
from moe_fx.graph.copy import copy_of
from moe_fx.graph.nodes import FRESH_BUFFERS, argument, shape, value
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.normalise.decomposed import CHAINS, Spelling
from moe_fx.passes.normalise.id_bounds import drop_masks_of_nothing

aten = torch.ops.aten
prims = torch.ops.prims

_ASSERTIONS = (aten._assert_tensor_metadata.default,)


def _type_as(node: Node) -> Spelling:
    return aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}


def _convert_element_type(node: Node) -> Spelling:
    return aten._to_copy.default, (node.args[0],), {"dtype": node.args[1]}


def _t(node: Node) -> Spelling | None:
    if len(shape(node)) != 2:
        return None
    return aten.transpose.int, (node.args[0], 0, 1), {}


def _permute(node: Node) -> Spelling | None:
    """A permute that swaps two dims is a transpose."""
    order = [dim % len(shape(node)) for dim in argument(node, 1, "dims")]
    moved = [at for at, dim in enumerate(order) if at != dim]
    if len(moved) != 2:
        return None
    return aten.transpose.int, (node.args[0], *moved), {}


def _mm(node: Node) -> Spelling | None:
    weight = _transposed(node.args[1])
    return None if weight is None else (aten.linear.default, (node.args[0], weight), {})


def _addmm(node: Node) -> Spelling | None:
    bias, rows, transposed = node.args
    weight = _transposed(transposed)
    if weight is None or node.kwargs or len(shape(bias)) != 1 or len(shape(weight)) != 2:
        return None
    return aten.linear.default, (rows, weight, bias), {}


def _transposed(node: Any) -> Node | None:
    """The matrix that ``node`` is the transpose of."""
    if not isinstance(node, Node) or node.target is not aten.transpose.int:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and len(shape(node)) == 2 else None


def _floor_div(node: Node) -> Spelling | None:
    if node.kwargs.get("rounding_mode") != "floor":
        return None
    return aten.floor_divide.default, node.args, {}


def _iota(node: Node) -> Spelling | None:
    if node.kwargs["start"] != 0 or node.kwargs["step"] != 1:
        return None
    kwargs = {name: node.kwargs[name] for name in ("dtype", "device")}
    return aten.arange.default, (node.args[0],), kwargs


def _softmax(node: Node) -> Spelling:
    logits, dim, to_float = node.args
    return aten.softmax.int, (logits, dim, *([torch.float32] if to_float else [])), {}


def _clamp_min(node: Node) -> Spelling:
    return aten.clamp.default, node.args, {}


def _clamp_max(node: Node) -> Spelling:
    return aten.clamp.default, (node.args[0], None, node.args[1]), {}


def _index_put_(node: Node) -> Spelling | None:
    """Into a buffer that nothing else reads, in place or not is the same."""
    buffer = node.args[0]
    assert isinstance(buffer, Node)
    if buffer.target not in FRESH_BUFFERS or len(buffer.users) != 1:
        return None
    return aten.index_put.default, node.args, dict(node.kwargs)


def _same(op: Any) -> Callable[[Node], Spelling]:
    return lambda node: (op, node.args, node.kwargs)


def _prim(op: Any) -> Callable[[Node], Spelling | None]:
    """An elementwise prim is the ATen op on floating operands, of one dtype as prims require."""

    def spelling(node: Node) -> Spelling | None:
        return (op, node.args, {}) if value(node).dtype.is_floating_point else None

    return spelling


def _prim_reduction(op: Any) -> Callable[[Node], Spelling | None]:
    def spelling(node: Node) -> Spelling | None:
        return None if node.kwargs else (op, (node.args[0], node.args[1]), {})

    return spelling


def _broadcast_in_dim(node: Node) -> Spelling | None:
    """One new dim of size 1, or existing dims expanded."""
    source, sizes, kept = node.args
    assert isinstance(sizes, (list, tuple)) and isinstance(kept, (list, tuple))
    added = [dim for dim in range(len(sizes)) if dim not in kept]
    if not added:
        return aten.expand.default, (source, sizes), {}
    if len(added) == 1 and sizes[added[0]] == 1:
        return aten.unsqueeze.default, (source, added[0]), {}
    return None


def _einsum(node: Node) -> Spelling | None:
    """Of three operands: the two with the most letters first, then the third."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    read = parsed(equation) if len(operands) == 3 else None
    if read is None:
        return None
    letters, out = read
    order = sorted(range(3), key=lambda at: -len(letters[at]))
    one, other, last = (letters[at] for at in order)
    kept = "".join(x for x in dict.fromkeys(one + other) if x in last + out)
    pair, first_equation = [operands[at] for at in order[:2]], f"{one},{other}->{kept}"
    with node.graph.inserting_before(node):
        first = node.graph.call_function(aten.einsum.default, (first_equation, pair))
    first.meta = {**node.meta, "val": aten.einsum.default(first_equation, list(map(value, pair)))}
    return aten.einsum.default, (f"{kept},{last}->{out}", [first, operands[order[2]]]), {}


SPELLINGS: dict[Any, Callable[[Node], Spelling | None]] = {
    aten.type_as.default: _type_as,
    prims.convert_element_type.default: _convert_element_type,
    aten.t.default: _t,
    aten.einsum.default: _einsum,
    aten.permute.default: _permute,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.div.Tensor_mode: _floor_div,
    aten.div.Scalar_mode: _floor_div,
    prims.iota.default: _iota,
    aten._softmax.default: _softmax,
    aten.clamp_min.default: _clamp_min,
    aten.clamp_max.default: _clamp_max,
    aten.index_put_.default: _index_put_,
    prims.add.default: _prim(aten.add.Tensor),
    prims.sub.default: _prim(aten.sub.Tensor),
    prims.mul.default: _prim(aten.mul.Tensor),
    prims.div.default: _prim(aten.div.Tensor),
    prims.neg.default: _prim(aten.neg.default),
    prims.exp.default: _prim(aten.exp.default),
    prims.reciprocal.default: _prim(aten.reciprocal.default),
    prims.sum.default: _prim_reduction(aten.sum.dim_IntList),
    prims.amax.default: _prim_reduction(aten.amax.default),
    prims.broadcast_in_dim.default: _broadcast_in_dim,
    **{op: _same(called) for op, called in AUTOGRAD_COLLECTIVES.items()},
}


class Normalise(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        graph = copy_of(module.graph)
        context.origin = dict(zip(graph.nodes, module.graph.nodes, strict=True))
        for node in list(graph.nodes):
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
            elif node.op == "call_function" and node.target in SPELLINGS:
                _spell(node, SPELLINGS[node.target](node))
        for node in list(graph.nodes):
            for chain in CHAINS.get(node.target, ()):
                if node.op == "call_function" and _spell(node, chain(node)):
                    break
        drop_masks_of_nothing(graph)
        return PassResult(GraphModule(module, graph), changed=True)


def _spell(node: Node, spelling: Spelling | None) -> bool:
    """Make ``node`` that op; erase those of its former inputs that nothing reads any more."""
    if spelling is None:
        return False
    before = node.all_input_nodes
    node.target, node.args, node.kwargs = spelling
    _erase_unread(before)
    return True


def _erase_unread(nodes: list[Node]) -> None:
    waiting = dict.fromkeys(nodes)
    while waiting:
        node, _ = waiting.popitem()
        if node.op == "call_function" and not node.users and not node.is_impure():
            waiting.update(dict.fromkeys(node.all_input_nodes))
            node.graph.erase_node(node)
