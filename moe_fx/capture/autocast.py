"""Autocast, said in the graph: the casts that it makes become nodes, and its regions are gone.

Pre-dispatch tracing sees an op before autocast does. Left alone, it writes down where a region
begins and ends and computes as if there were none: it takes ``.float()`` for a no-op, and drops it.
`Regions` makes the trace see what happens. Regions are entered for real, and

    for each op of the trace, where autocast is on:
        it has an autocast kernel                        -> trace that, and the casts it makes
        it is made of ops, which autocast would change   -> trace these, unless what is cast may
                                                            as well be cast before
        otherwise                                        -> the op as it is

What is captured computes the same wherever autocast is off, which `switch_off` makes sure of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from moe_fx.compat import (
    autocast_devices,
    autocast_key,
    autocast_off,
    call_kernel,
    enter_autocast,
    exit_autocast,
    in_python,
    intercept,
    is_made_of_others,
    untraced,
)

__all__ = ["Autocast", "Regions", "enclose", "switch_off"]

_SETTERS = {enter_autocast, torch.set_autocast_enabled, torch.set_autocast_cpu_enabled}

_TO_COPY = torch.ops.aten._to_copy.default
_MOVES = {
    _TO_COPY,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.diagonal.default,
}
"""A cast before one of these is as good as one after, for the gradients too."""

Again = AbstractContextManager[Any]


@dataclass(frozen=True)
class Autocast:
    """A state. on: ``(device type, dtype)`` of each device type for which autocast is on."""

    on: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def now(cls) -> Autocast:
        on = [device for device in autocast_devices() if torch.is_autocast_enabled(device)]
        return cls(tuple((device, torch.get_autocast_dtype(device)) for device in on))


class Regions:
    """Has one trace of Dynamo's graph see what autocast does.

    opaque: the state where the trace came upon each op that `moe_fx.capture.opaque` hides, by key;
    what is put back there is to run in it.
    """

    def __init__(self) -> None:
        # _changed: how many ops had an autocast kernel; _calls: of an op that is looked into
        self.opaque: dict[int, Autocast] = {}
        self._entered: list[Any] = []
        self._changed = 0
        self._calls: list[_Call] | None = None

    @contextmanager
    def traceable(self, module: GraphModule) -> Iterator[GraphModule]:
        """What to trace in place of ``module``: the module itself where autocast is off throughout.
        Leaves the state as it was, however the trace ends."""
        graph = module.graph
        if not (Autocast.now().on or any(node.target in _SETTERS for node in graph.nodes)):
            yield module
            return
        module = GraphModule(module, copy.deepcopy(graph))
        for node in module.graph.nodes:
            if node.target is enter_autocast:
                node.target = self._enter
            elif node.target is exit_autocast:
                node.target = self._exit
        first = next(node for node in module.graph.nodes if node.op != "placeholder")
        with module.graph.inserting_before(first):
            module.graph.call_function(self._listen)
        module.recompile()
        try:
            yield module
        finally:
            while self._entered:
                self._exit(self._entered[-1])

    def _listen(self) -> None:
        intercept(self._traced)

    def _enter(self, *region: Any) -> Any:
        self._entered.append(in_python(enter_autocast, *region))
        return self._entered[-1]

    def _exit(self, entered: Any) -> None:
        self._entered.remove(entered)
        in_python(exit_autocast, entered)

    def _traced(
        self, op: OpOverload, go_on: Callable[[], Any], again: Again, args: Any, kwargs: Any
    ) -> Any:
        composed = is_made_of_others(op)
        if composed and any(argument.alias_info for argument in op._schema.arguments):
            return go_on()  # which traces the others, here
        state = Autocast.now()
        key = autocast_key(op, _tensors((args, kwargs))) if state.on else None
        if key is not None:
            self._changed += 1
            with again:
                return call_kernel(op, key, args, kwargs)
        if op is torch.ops.moe_fx._opaque.default:
            self.opaque[args[2]] = state
        if composed and state.on and _computes(op, args, kwargs):
            calls = self._look_ahead(op, again, args, kwargs)
            if calls:
                dtype = self._of_cast_inputs(calls, op, again, args, kwargs)
                with again:
                    if dtype is None:
                        return op.decompose(*args, **kwargs)
                    args, kwargs = _cast((args, kwargs), dtype)
                    with autocast_off():
                        return op(*args, **kwargs)
        if self._calls is not None and _computes(op, args, kwargs):
            self._calls.append(_Call.of(op, (args, kwargs)))
        with autocast_off():
            return go_on()

    def _look_ahead(self, op: OpOverload, again: Again, args: Any, kwargs: Any) -> list[_Call]:
        """What ``op`` comes down to; nothing if autocast changes none of it."""
        outer, self._calls = self._calls, []
        before = self._changed
        try:
            with untraced(), again:
                result = op.decompose(*args, **kwargs)
            calls = [*self._calls, _Call.of("result", result)]
            return calls if self._changed > before else []
        finally:
            self._calls = outer

    def _of_cast_inputs(
        self, calls: Sequence[_Call], op: OpOverload, again: Again, args: Any, kwargs: Any
    ) -> torch.dtype | None:
        """The dtype in which all that ``op`` computes is computed, if it may as well be called with
        inputs of that dtype: an ``einsum`` casts its operands after it has viewed them otherwise.
        """
        dtypes = {dtype for call in calls if call.op not in _MOVES for dtype in call.dtypes}
        if len(dtypes) != 1:
            return None
        (dtype,) = dtypes
        to_cast = [
            t for t in _tensors((args, kwargs)) if t.is_floating_point() and t.dtype != dtype
        ]
        if len(to_cast) != sum(call.op is _TO_COPY for call in calls):
            return None
        with untraced(), again:
            args, kwargs = _cast((args, kwargs), dtype)
        cast_before = self._look_ahead(op, again, args, kwargs)
        return dtype if _but_casts(cast_before) == _but_casts(calls) else None


@dataclass(frozen=True)
class _Call:
    """dtypes: of its floating tensors. others: its arguments but for the tensors, as text (to
    compare two sizes may specialise them)."""

    op: Any
    dtypes: tuple[torch.dtype, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, op: Any, arguments: Any) -> _Call:
        dtypes = [t.dtype for t in _tensors(arguments) if t.is_floating_point()]
        leaves = pytree.tree_leaves(arguments)
        others = [str(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
        return cls(op, tuple(dtypes), tuple(others))


def _computes(op: OpOverload, args: Any, kwargs: Any) -> bool:
    """From floating tensors to tensors."""
    returns = any("Tensor" in str(returned.type) for returned in op._schema.returns)
    return returns and any(tensor.is_floating_point() for tensor in _tensors((args, kwargs)))


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        return _TO_COPY(tensor, dtype=dtype)

    return pytree.tree_map_only(Tensor, cast, arguments)


def _but_casts(calls: Sequence[_Call]) -> list[tuple[Any, tuple[str, ...]]]:
    return [(call.op, call.others) for call in calls if call.op is not _TO_COPY]


def enclose(graph: Graph, regions: Sequence[tuple[Any, ...]], first: Node, last: Node) -> None:
    """Have the nodes from ``first`` to before ``last`` run in ``regions``: arguments of
    ``torch.autocast``, the outermost first."""
    with graph.inserting_before(first):
        entered = [graph.call_function(enter_autocast, region) for region in regions]
    with graph.inserting_before(last):
        for region in reversed(entered):
            graph.call_function(exit_autocast, (region,))


def switch_off(module: GraphModule) -> None:
    """Have a captured graph, in place, compute with autocast off although it is on here. (Not what
    is around it: its gradients are computed in the state that compilers compute them in.)"""
    graph = module.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    (output,) = graph.find_nodes(op="output")
    regions = [(device, dtype, False, None) for device, dtype in Autocast.now().on]
    enclose(graph, regions, first, output)
    module.recompile()
