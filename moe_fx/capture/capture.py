"""Capture: Dynamo's graph to functional ATen, before decomposition and autograd.

One normal form for every base compiler, with the model's source lines on its nodes. Training works
because dialect ops carry autograd formulas and the base compiler differentiates the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.capture.autocast import Regions
from moe_fx.capture.bodies import note_outside, path_of
from moe_fx.capture.grad_modes import without_inference_mode
from moe_fx.capture.opaque import hide, restore
from moe_fx.capture.outline import enters_a_level
from moe_fx.compat import (
    GIVE_OTHER_STORAGE,
    NoExport,
    export_functional,
    is_traceable_wrapper_subclass,
)
from moe_fx.graph.gathers import merge_gathers
from moe_fx.region import Declined, source_of
from moe_fx.report.naming import name_inputs

_MOST_KEPT = 1 << 16


def capture(module: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """``module`` as a functional ATen graph with the same inputs and outputs.

    Where the model mutates an input in place (a key-value cache), the mutation is written back at
    the end of the graph. What autocast casts, inside or around ``module``, is cast by nodes: the
    graph is to run with autocast off. Raises `NotFunctional` for what has no functional form.
    """
    _check_functional(module)
    _check_tensors(module, inputs)
    module, hidden = hide(without_inference_mode(module))
    _check_levels(module)
    regions = Regions()
    try:
        with regions.traceable(module) as traceable:
            graph_module, signature = export_functional(traceable, inputs)
    except NoExport as refusal:
        raise NotFunctional(Declined(f"AOT export refuses the graph: {refusal}", "", "")) from None
    restore(graph_module, hidden, regions.opaque)
    note_outside(graph_module)
    merge_gathers(graph_module.graph, path_of)
    _make_copies_differentiable(graph_module)
    _note_values(graph_module, inputs)
    _note_parameters(graph_module, module, inputs)
    _note_graph_break(graph_module, module)
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        _write_back(graph_module, mutated)
    name_inputs(graph_module, module)
    return graph_module


class NotFunctional(Exception):
    """The graph can't be made functional; ``declined`` says where and why."""

    def __init__(self, declined: Declined) -> None:
        super().__init__(declined.reason)
        self.declined = declined


def _check_functional(module: GraphModule) -> None:
    """``module.to(dtype)`` within a forward gives a parameter other storage (Switch Transformers):
    AOT has no functional form of that."""
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in GIVE_OTHER_STORAGE:
            reason = f"the graph gives a parameter other storage ({node.name}), as module.to() does"
            raise NotFunctional(Declined(reason, node.name, source_of(node)))


def _check_tensors(module: GraphModule, inputs: Sequence[Any]) -> None:
    """AOT export takes no subclass of `Tensor` that holds others, as quantised weights do."""
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if is_traceable_wrapper_subclass(value):
            kind = f"a {type(value).__name__}, a tensor subclass, which AOT export does not take"
            user = next(iter(node.users), node)
            raise NotFunctional(Declined(f"{node.name} is {kind}", node.name, source_of(user)))


def _check_levels(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if enters_a_level(node):
            reason = "a function transform that changes tensors in place, or gives no tensors"
            raise NotFunctional(Declined(reason, node.name, source_of(node)))


def _note_values(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Keep what is known of the inputs: ``meta["scalar"]``, a float of the model (a routing scale;
    under ``dynamic=True`` Dynamo passes those as 0-d tensors), and ``meta["real"]``, integers,
    bools and masks (ids, expert maps), so that proofs run on what they can hold."""
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, given in zip(placeholders, inputs, strict=True):
        if not isinstance(given, Tensor) or type(given) not in (Tensor, torch.nn.Parameter):
            continue
        if given.dim() == 0 and given.device.type == "cpu" and given.is_floating_point():
            node.meta["scalar"] = given.item()
        elif given.numel() <= _MOST_KEPT and given.device.type != "meta" and _is_mask(given):
            node.meta["real"] = given.detach().cpu().clone()


def _is_mask(given: Tensor) -> bool:
    """Whether its entries are not to be made up: integers, bools, or floats that are 0 or 1."""
    if not given.is_floating_point():
        return not given.is_complex()
    return given.dtype.itemsize > 1 and bool(((given == 0) | (given == 1)).all())


def _note_parameters(traced: GraphModule, module: GraphModule, inputs: Sequence[Any]) -> None:
    """Which inputs are parameters or buffers of the model, and so hold no tokens: Dynamo notes that
    of those that a module holds."""
    ours, theirs = (each.graph.find_nodes(op="placeholder") for each in (traced, module))
    for node, given, value in zip(ours, theirs, inputs, strict=True):
        static = "_dynamo_static_input_type" in given.meta.get("tensor_dict", {})
        if static or isinstance(value, torch.nn.Parameter):
            node.meta["parameter"] = True


def _note_graph_break(traced: GraphModule, module: GraphModule) -> None:
    """``file:line`` in the model where Dynamo ended the graph, if that is a graph break."""
    ended = getattr(module, "compile_subgraph_reason", None)
    if ended is not None and ended.graph_break and ended.user_stack:
        frame = ended.user_stack[-1]
        traced.graph.output_node().meta["graph_break"] = f"{frame.filename}:{frame.lineno}"


def _make_copies_differentiable(module: GraphModule) -> None:
    """``x[...] = y`` becomes ``aten.copy(x, y)``, which has no derivative: take ``y`` in the shape
    and dtype of ``x`` instead."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default):
        target, source = node.args[0], node.args[1]
        to, of = target.meta["val"], source.meta["val"]
        with module.graph.inserting_before(node):
            result = module.graph.call_function(torch.ops.aten.expand_as.default, (source, target))
            result.meta = dict(node.meta)
            if to.dtype != of.dtype:
                result = module.graph.call_function(
                    torch.ops.aten._to_copy.default, (result,), {"dtype": to.dtype}
                )
                result.meta = dict(node.meta)
        node.replace_all_uses_with(result, propagate_meta=False)
        module.graph.erase_node(node)
    module.recompile()


def _write_back(module: GraphModule, mutated: list[str]) -> None:
    """The exported graph returns new values of mutated inputs first: copy them, return the rest."""
    placeholders = {node.name: node for node in module.graph.nodes if node.op == "placeholder"}
    output: Node = next(iter(reversed(module.graph.nodes)))
    results: Any = output.args[0]
    with module.graph.inserting_before(output):
        for name, new_value in zip(mutated, results, strict=False):
            module.graph.call_function(
                torch.ops.aten.copy_.default, (placeholders[name], new_value)
            )
    output.args = (tuple(results[len(mutated) :]),)
    module.recompile()
