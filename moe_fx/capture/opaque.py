"""Carry higher-order ops and function transforms through a functional trace unopened.

Pre-dispatch tracing of torch 2.13 cannot enter some higher-order ops (``associative_scan``), nor
what runs under ``vmap`` (`moe_fx.capture.outline`). Base compilers can, later. So before the trace
each is hidden behind an op that stands for it, with its inputs and outputs, and put back
afterwards. No region is looked for inside one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from moe_fx.capture.autocast import Autocast, enclose
from moe_fx.capture.outline import is_outlined, outline
from moe_fx.ops._define import define

_keys = itertools.count()
_hidden: dict[int, _Hidden] = {}


@dataclass(frozen=True)
class _Hidden:
    """target: the op, or the submodule that is called. leaves: its flattened arguments, where a
    `_Slot` stands for the n-th tensor or size that goes through the trace and a GraphModule for a
    subgraph. outputs: examples."""

    target: HigherOrderOperator | GraphModule
    leaves: list[Any]
    spec: pytree.TreeSpec
    outputs: tuple[Tensor, ...]
    single: bool


@dataclass(frozen=True)
class _Slot:
    at: int
    is_tensor: bool


def hide(module: GraphModule) -> tuple[GraphModule, list[int]]:
    """(copy of Dynamo's graph with each higher-order op and transform replaced, keys for
    `restore`); the graph itself if it has none."""
    keys: list[int] = []
    module = outline(module)
    if not any(_is_hidden(node) for node in module.graph.nodes):
        return module, keys
    module = GraphModule(module, copy.deepcopy(module.graph))
    for node in list(module.graph.nodes):
        if _is_hidden(node):
            hidden, tensors, sizes = _describe(module, node)
            key = next(_keys)
            _hidden[key] = hidden
            keys.append(key)
            with module.graph.inserting_before(node):
                stand_in = module.graph.call_function(
                    torch.ops.moe_fx._opaque.default, (tensors, sizes, key)
                )
                result = stand_in
                if hidden.single:
                    result = module.graph.call_function(_first, (stand_in,))
            stand_in.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:  # the subgraphs of what was hidden
            module.graph.erase_node(node)
    module.recompile()
    return module, keys


def restore(module: GraphModule, keys: Sequence[int], autocast: Mapping[int, Autocast]) -> None:
    """Put the ops behind ``keys`` back into the traced graph, in place; those in ``autocast`` in a
    region of that state."""
    if not keys:
        return
    for node in module.graph.find_nodes(
        op="call_function", target=torch.ops.moe_fx._opaque.default
    ):
        tensors, sizes, key = node.args
        hidden = _hidden[key]
        leaves = [
            _leaf(module, node, leaf, tensors, sizes, f"higher_order_{key}_{at}")
            for at, leaf in enumerate(hidden.leaves)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, hidden.spec)
        with module.graph.inserting_before(node):
            if isinstance(hidden.target, GraphModule):
                name = f"transformed_{key}"
                module.add_submodule(name, hidden.target)
                original = module.graph.call_module(name, args, kwargs)
            else:
                original = module.graph.call_function(hidden.target, args, kwargs)
        original.meta = dict(node.meta)
        if key in autocast:
            regions = [(device, dtype, True, None) for device, dtype in autocast[key].on]
            enclose(module.graph, regions, original, original.next)
        if hidden.single:
            for user in list(node.users):
                user.replace_all_uses_with(original)
                module.graph.erase_node(user)
        else:
            node.replace_all_uses_with(original)
        module.graph.erase_node(node)
    for key in keys:
        del _hidden[key]
    module.recompile()


def _leaf(module: GraphModule, before: Node, leaf: Any, tensors: Any, sizes: Any, name: str) -> Any:
    if isinstance(leaf, _Slot):
        return tensors[leaf.at] if leaf.is_tensor else sizes[leaf.at]
    if isinstance(leaf, GraphModule):
        module.add_submodule(name, leaf)
        with module.graph.inserting_before(before):
            return module.graph.get_attr(name)
    return leaf


def _describe(module: GraphModule, node: Node) -> tuple[_Hidden, list[Node], list[Any]]:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    tensors: list[Node] = []
    sizes: list[Any] = []
    leaves: list[Any] = []
    for leaf in flat:
        example = leaf.meta.get("example_value") if isinstance(leaf, Node) else None
        if isinstance(leaf, Node) and leaf.op == "get_attr" and not isinstance(example, Tensor):
            leaves.append(module.get_submodule(str(leaf.target)))
        elif isinstance(example, Tensor):
            leaves.append(_Slot(len(tensors), is_tensor=True))
            tensors.append(leaf)
        elif isinstance(leaf, Node):
            leaves.append(_Slot(len(sizes), is_tensor=False))
            sizes.append(leaf)
        else:
            leaves.append(leaf)
    outputs = node.meta["example_value"]
    single = isinstance(outputs, Tensor)
    examples = (outputs,) if single else tuple(outputs)
    outlined = node.op == "call_module"
    target = module.get_submodule(str(node.target)) if outlined else node.target
    assert isinstance(target, (HigherOrderOperator, GraphModule))
    return _Hidden(target, leaves, spec, examples, single), tensors, sizes


def _is_hidden(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) or is_outlined(node)


def _first(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0]


def _opaque(tensors: list[Tensor], sizes: list[SymInt], key: int) -> list[Tensor]:
    raise RuntimeError(f"{_hidden[key].target} was to be put back before the graph runs")


def _opaque_fake(tensors: list[Tensor], sizes: list[SymInt], key: int) -> list[Tensor]:
    return [
        torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
        for out in _hidden[key].outputs
    ]


define("_opaque(Tensor[] tensors, SymInt[] sizes, int key) -> Tensor[]", _opaque, _opaque_fake)
