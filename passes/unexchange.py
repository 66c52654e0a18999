"""Unexchange: a dispatcher's exchange as the gather of weights that it is equal to.

Contract. In: a normalised graph. Out: the same graph, in which each exchange of moe_fx's dispatcher
(`moe_fx.dispatcher`) has a *stand-in* that reads its tokens, ids and weights: the program without
exchange, every rank with all experts, gathered from the ranks' shards. Recognition finds that; the
rewrite cancels the gathers and exchanges tokens again, in chunks. ``context.stand_ins`` says what
stands for what: a stand-in whose region is not accepted gives way to the captured program.

Pseudo-code, for each ``unpermute`` that ends a dispatcher's way::

    go back: wait, all_to_all, (unpermute), the experts, (regroup), wait, all_to_all, permute
    tables = all_gather(each tensor of L experts that the experts read)
    rows = tokens by expert (tokens by pair, if they were not regrouped);  counts [L] -> [E]
    result = sum of experts(rows), put back in pair order, times the weights
    both, on every rank in lock step, on random values: equal, or the stand-in is dropped

In the experts' ops, numbers that count experts (``bins=L``) become those of all.

Rejects (declined): rows or counts read by others; an order or group not the dispatcher's own; ids
that no top-k of the graph selects; experts whose values with all tables differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from moe_fx import simulate
from moe_fx.compat import FakeValues, resolve_group
from moe_fx.passes.base import Context, Pass, PassResult, StandIn
from moe_fx.passes.extract import Extract, extract
from moe_fx.passes.flow import Flow, closure
from moe_fx.passes.id_bounds import drop_masks_of_nothing
from moe_fx.passes.normalise import copy_graph
from moe_fx.passes.on_host import reference_ops
from moe_fx.passes.roles import VIEWS, Refusal, is_unary_rowwise, same, shape, value
from moe_fx.passes.sizes import TokenCount, choose_token_count, example
from moe_fx.region import Declined, source_of

aten, collectives = torch.ops.aten, torch.ops._c10d_functional
ops = torch.ops.moe_fx

_TOLERANCE = 1e-4
_COARSE_TOLERANCE = 6e-2
_TRIED_TOKENS = 5


class Unexchange(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        for node in list(module.graph.nodes):
            if node.target is ops.gather_counts.default:
                context.exchange_groups.add(str(node.args[2]))
            if node.target is not ops.unpermute.default or not _comes_back(node):
                continue
            before = set(module.graph.nodes)
            try:
                found = Exchange(Flow(module), node)
                stand_in = build(found, module)
                require_equal(found, stand_in)
            except Refusal as refusal:
                for added in [n for n in reversed(module.graph.nodes) if n not in before]:
                    module.graph.erase_node(added)
                flow = Flow(module)
                select = flow.selection_above(node)
                if select is not None:
                    context.claimed |= flow.router_selections(select)
                context.report.declined.append(
                    Declined(
                        refusal.reason,
                        refusal.node.name,
                        source_of(refusal.node) or source_of(node),
                        "exchanged",
                    )
                )
            else:
                node.replace_all_uses_with(stand_in.result, propagate_meta=False)
                context.stand_ins.append(stand_in)
        if context.stand_ins:
            drop_masks_of_nothing(module.graph)  # of ids past the local experts
        return PassResult(module, changed=bool(context.stand_ins))


def _comes_back(node: Node) -> bool:
    """Whether ``node`` sums rows that a ``wait`` brought, and no other ``unpermute`` in between."""
    rows = node.args[0]
    return isinstance(rows, Node) and rows.target is ops.wait.default


class Exchange:
    """The nodes of one dispatcher's way, from its last one; raises `Refusal`."""

    def __init__(self, flow: Flow, end: Node) -> None:
        self.flow, self.end = flow, end
        back = self._node(end.args[0], ops.wait)
        combine = self._node(back.args[0], ops.all_to_all)
        self.permute = self._of_item(end.args[1], ops.permute, 1)
        self.tokens, self.ids = self._given(self.permute.args[0]), self._given(self.permute.args[1])
        self.weights = None if end.args[2] is None else self._given(end.args[2])
        there = self._dispatch()
        self.group, self.world = str(there.args[4]), resolve_group(str(there.args[4])).size()
        self.regroup = next((n for n in there.users if n.target is ops.regroup.default), None)
        self.rows = self._rows(there)
        self.out = self._result(combine)
        self._check_sizes(there.args[2:4], combine.args[1:3])
        self.counts = [
            n for n in self.received.users if n.target is aten.sum.dim_IntList and n.args[1] == [0]
        ]
        self.arrived_ids = [
            n for n in self.received.users if n.target is ops.arrived_experts.default
        ]
        self._check_readers()
        self._check_escapes()
        if flow.selection_above(self.ids) is None:
            raise Refusal("the expert ids come from no top-k of this graph", self.ids)

    @property
    def top_k(self) -> int:
        return int(shape(self.ids)[1])

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.world

    def _node(self, node: Any, packet: Any) -> Node:
        if not isinstance(node, Node) or node.target is not packet.default:
            raise Refusal(f"{node} is not the dispatcher's {packet}", self.end)
        return node

    def _of_item(self, node: Any, packet: Any, index: int) -> Node:
        if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == index:
            return self._node(node.args[0], packet)
        raise Refusal(f"{node} is not the dispatcher's {packet}[{index}]", self.end)

    def _given(self, node: Any) -> Node:
        assert isinstance(node, Node)
        return node

    def _dispatch(self) -> Node:
        """The wait for the rows that ``permute`` sorted."""
        sent = _item(self.permute, 0)
        starts = (
            [] if sent is None else [n for n in sent.users if n.target is ops.all_to_all.default]
        )
        waits = [n for start in starts for n in start.users if n.target is ops.wait.default]
        if len(waits) != 1 or not same(shape(sent)[0], _pairs(self.ids)):
            raise Refusal("the sorted rows are not sent once, all of them", self.permute)
        return waits[0]

    def _rows(self, there: Node) -> Node:
        if self.regroup is None:
            return there
        rows = _item(self.regroup, 0)
        if rows is None:
            raise Refusal("the rows that arrive are put in order and not read", there)
        return rows

    def _result(self, combine: Node) -> Node:
        """The experts' result for `rows`, in their order."""
        sent = self._given(combine.args[0])
        if self.regroup is None:
            return sent
        undone = sent.target is ops.unpermute.default and sent.args[2] is None
        if not undone or sent.args[1] is not _item(self.regroup, 1):
            raise Refusal("the experts' rows are not put back in the order they came in", sent)
        return self._given(sent.args[0])

    def _check_sizes(self, there: Any, back: Any) -> None:
        sizes = {_place_in_sizes(n) for n in (*there, *back)}
        read = [_place_in_sizes(n) for n in (*there, *back)]
        sources = {place[0] for place in sizes if place is not None}
        if None in sizes or len(sources) != 1 or [p[1] for p in read if p] != [0, 1, 1, 0]:
            raise Refusal(
                "the exchange and its way back do not have the dispatcher's sizes", self.end
            )
        self.sizes = self._node(sources.pop(), ops.checked_sizes)
        self.num_experts = int(self.sizes.args[1])  # type: ignore[arg-type]
        gathered = self._node(self.sizes.args[0], ops.gather_counts)
        counted = self._of_item(gathered.args[0], ops.dispatch_counts, 0)
        if counted.args[0] is not self.ids or gathered.args[2] != self.group:
            raise Refusal("the counts are not those of the ids that sort the rows", counted)
        own = [n for n in gathered.users if n.target is aten.slice.Tensor]
        rank = int(self.sizes.args[2])  # type: ignore[arg-type]
        bounds = (rank * self.local_experts, (rank + 1) * self.local_experts)
        if len(own) != 1 or own[0].args[1] != 1 or tuple(own[0].args[2:4]) != bounds:
            raise Refusal("the counts received are not those of this rank's experts", gathered)
        self.received = own[0]
        if self.regroup is not None and self.regroup.args[1] is not self.received:
            raise Refusal("rows are regrouped by other counts than the dispatcher's", self.regroup)

    def _check_readers(self) -> None:
        known = {self.regroup, *self.counts, *self.arrived_ids}
        others = [n for n in self.received.users if n not in known]
        if others:
            raise Refusal(f"the counts received are read by {others[0]}", others[0])
        if self.regroup is None and self.counts and self.local_experts > 1 and not self.arrived_ids:
            raise Refusal("rows are told apart by their number, but not sorted", self.rows)

    def _check_escapes(self) -> None:
        inside = set(self.nodes())
        for node in inside - {self.end}:
            for user in node.users:
                holds_rows = isinstance(value(node), (Tensor, tuple, list))
                if holds_rows and user not in inside and not _is_size(user):
                    raise Refusal(f"{node}, on the dispatcher's way, is read by {user}", user)

    @property
    def inputs(self) -> list[Node]:
        return [n for n in (self.tokens, self.ids, self.weights) if n is not None]

    def body(self) -> list[Node]:
        """What is done to rows, in graph order."""
        starts = [self.rows, *self.counts, *self.arrived_ids]
        inside = self.flow.below(*starts) & self.flow.above(self.out)
        return [n for n in self.flow.ordered(inside) if n not in starts]

    def nodes(self) -> list[Node]:
        """The whole way, in graph order."""
        inside = self.flow.below(self.permute, self.received, self.sizes) & self.flow.above(
            self.end
        )
        counting = closure(
            [self.sizes], lambda n: [s for s in n.all_input_nodes if s is not self.ids]
        )
        return self.flow.ordered(inside | counting | {self.permute})


def build(found: Exchange, module: GraphModule) -> StandIn:
    """The stand-in, in front of the exchange's last node; nothing reads it yet."""
    return _Builder(found, FakeValues(module.graph)).stand_in()


class _Builder:
    def __init__(self, found: Exchange, values: FakeValues) -> None:
        self.found, self.values, self.graph = found, values, found.end.graph
        self.added: list[Node] = []
        self.gathered: dict[Node, Node] = {}
        self.gathers: list[Node] = []
        self.shards: list[Node] = []

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.found.end):
            node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.found.end.meta.get("stack_trace", "")
        try:
            self.values.compute(node)
        except Exception as error:  # whatever an op says of sizes that do not fit
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refusal(f"with all experts, {op} fails: {said}", self.found.end) from error
        self.added.append(node)
        return node

    def stand_in(self) -> StandIn:
        found = self.found
        flat = self.call(aten.reshape.default, found.ids, [-1])
        counts = self.call(aten.bincount.default, flat, None, found.num_experts)
        sorted_rows = found.regroup is not None or not found.arrived_ids
        order = rows = None
        if sorted_rows:
            order = self.call(aten.argsort.stable, flat, stable=True)
            token = self.call(aten.floor_divide.default, order, found.top_k)
            rows = self.call(aten.index.Tensor, found.tokens, [token])
        else:
            width = shape(found.tokens)[1]
            each = self.call(aten.unsqueeze.default, found.tokens, 1)
            copies = self.call(aten.expand.default, each, [-1, found.top_k, -1])
            rows = self.call(aten.reshape.default, copies, [self._num_pairs(), width])
        result = self._experts(rows, counts, flat)
        if order is not None:
            inverse = self.call(aten.argsort.default, order)
            result = self.call(aten.index.Tensor, result, [inverse])
        num_tokens = self._num_tokens()
        width = shape(result)[-1]
        grouped = self.call(aten.view.default, result, [num_tokens, found.top_k, width])
        if found.weights is not None:
            factor = self.call(aten.unsqueeze.default, found.weights, -1)
            grouped = self.call(aten.mul.Tensor, grouped, factor)
        summed = self.call(aten.sum.dim_IntList, grouped, [1])
        chains = [n for n in self.gathered if n not in self.shards]
        return StandIn(
            captured=found.end,
            result=summed,
            nodes=tuple(self.added),
            gathers=tuple(self.gathers),
            shards=tuple(self.shards),
            replaced=tuple(found.flow.ordered([*found.nodes(), *chains])),
        )

    def _num_tokens(self) -> Any:
        size = shape(self.found.ids)[0]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, self.found.tokens, 0)

    def _num_pairs(self) -> Any:
        tokens, top_k = self._num_tokens(), self.found.top_k
        return tokens * top_k if isinstance(tokens, int) else self.call(operator.mul, tokens, top_k)

    def _experts(self, rows: Node, counts: Node, flat: Node) -> Node:
        """The captured body on all rows, with all experts."""
        found = self.found
        to: dict[Node, Any] = {found.rows: rows}
        to |= dict.fromkeys(found.counts, counts) | dict.fromkeys(found.arrived_ids, flat)
        for node in found.body():
            if node.target is aten.sym_size.int and same(value(node), shape(found.rows)[0]):
                to[node] = self._num_pairs()
                continue
            args, kwargs = _of_all_experts(node, found.local_experts, found.num_experts)
            args, kwargs = map_arg((args, kwargs), lambda n: to[n] if n in to else self._table(n))
            to[node] = self.call(node.target, *args, **kwargs)
            to[node].meta["stack_trace"] = node.meta.get("stack_trace", "")
        result = to.get(found.out)
        if not isinstance(result, Node):
            raise Refusal("the experts' result does not come from the rows", found.out)
        return result

    def _table(self, node: Node) -> Node:
        """What the body reads from outside: gathered, if it holds something for each local
        expert."""
        if node in self.gathered:
            return self.gathered[node]
        val = value(node)
        if not isinstance(val, Tensor) or not shape(node):
            return node
        if not same(shape(node)[0], self.found.local_experts):
            return node
        if node.op == "call_function" and is_unary_rowwise(node):
            (source,) = node.all_input_nodes
            full = self._table(source)
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: full if n is source else n)
            if node.target in VIEWS:
                args = (full, [self.found.num_experts, *shape(node)[1:]])
            self.gathered[node] = self.call(node.target, *args, **kwargs)
            return self.gathered[node]
        start = self.call(
            collectives.all_gather_into_tensor.default, node, self.found.world, self.found.group
        )
        full = self.call(collectives.wait_tensor.default, start)
        self.gathers.append(full)
        self.shards.append(node)
        self.gathered[node] = full
        return full


def _of_all_experts(node: Node, local: int, everyone: int) -> tuple[Any, Any]:
    """The node's arguments with numbers of local experts made numbers of all."""
    named = _EXPERT_NUMBERS.get(node.target)
    if named is None or not hasattr(node.target, "_schema"):
        return node.args, node.kwargs
    to = {local: everyone, local - 1: everyone - 1}

    def number(argument: Any) -> Any:
        is_number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
        return type(argument)(to[argument]) if is_number and argument in to else argument

    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = tuple(
        map_aggregate(a, number) if name in named else a
        for name, a in zip(names, node.args, strict=False)
    )
    kwargs = {k: map_aggregate(v, number) if k in named else v for k, v in node.kwargs.items()}
    return args, kwargs


_EXPERT_NUMBERS: dict[Any, tuple[str, ...]] = {
    aten.histc.default: ("bins", "max"),
    aten.bincount.default: ("minlength",),
    aten.clamp.default: ("max",),
    aten.one_hot.default: ("num_classes",),
    aten.arange.default: ("end",),
    aten.zeros.default: ("size",),
    aten.new_zeros.default: ("size",),
    **dict.fromkeys(
        (
            *(aten.ge.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.le.Scalar),
            *(aten.eq.Scalar, aten.ne.Scalar),
        ),
        ("other",),
    ),
}


# -- by value --------------------------------------------------------------------------------------


def require_equal(found: Exchange, stand_in: StandIn) -> None:
    """Raise `Refusal` unless both give the same on every rank, on random values."""
    captured = extract(list(stand_in.replaced), [found.end])
    standing = extract(list(stand_in.nodes), [stand_in.result])
    generator = torch.Generator().manual_seed(0)
    tried = [
        choose_token_count(
            shape(found.ids)[0], found.top_k, found.num_experts, _TRIED_TOKENS - rank % 3
        )
        for rank in range(found.world)
    ]
    shared: dict[Node, Any] = {}
    per_rank = [
        _values(found, stand_in, (*captured.inputs, *standing.inputs), shared, count, generator)
        for count in tried
    ]
    results = []
    for side, modules in (
        (captured, [_of_rank(found, captured, rank) for rank in range(found.world)]),
        (standing, [standing.module] * found.world),
    ):
        inputs = [[values[node] for node in side.inputs] for values in per_rank]
        try:
            results.append(
                simulate.run(
                    modules,
                    inputs,
                    overrides=reference_ops(side.module),
                    resize=[_resize(count) for count in tried],
                )
            )
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = f"could not be compared with gathered experts: {error}"
            raise Refusal(reason, found.end) from error
    coarse = value(found.tokens).dtype in (torch.float16, torch.bfloat16)
    for (left,), (right,) in zip(*results, strict=True):
        distance = (left.double() - right.double()).abs().max() if left.numel() else 0.0
        scale = left.abs().max().clamp(min=1e-6) if left.numel() else 1.0
        if not distance <= scale * (_COARSE_TOLERANCE if coarse else _TOLERANCE):
            raise Refusal("with the experts of all ranks the result is another", found.end)


def _values(
    found: Exchange,
    stand_in: StandIn,
    inputs: tuple[Node, ...],
    shared: dict[Node, Any],
    count: TokenCount,
    generator: torch.Generator,
) -> dict[Node, Any]:
    """By input of either graph: tokens and tables of a rank's own, all else in common."""
    values: dict[Node, Any] = {}
    for node in dict.fromkeys(inputs):
        if node is found.ids:
            scores = torch.rand(count.wanted, found.num_experts, generator=generator)
            values[node] = scores.argsort(1)[:, : found.top_k].contiguous().to(value(node).dtype)
        elif node in found.inputs:
            values[node] = example(node, count, generator, per_token=True)
        elif node in stand_in.shards:
            table = example(node, count, generator)
            values[node] = table * max(1, table.shape[-1]) ** -0.5
        elif isinstance(value(node), Tensor):
            if node not in shared:
                shared[node] = example(node, count, generator)
            values[node] = shared[node]
        else:
            values[node] = example(node, count, generator)
    return values


def _of_rank(found: Exchange, captured: Extract, rank: int) -> GraphModule:
    """The captured program as another rank has it."""
    copy = copy_graph(captured.module)
    pairs = dict(zip(captured.module.graph.nodes, copy.graph.nodes, strict=True))
    sizes, received = (pairs[captured.copies[n]] for n in (found.sizes, found.received))
    sizes.args = (*sizes.args[:2], rank, *sizes.args[3:])
    local = found.local_experts
    received.args = (*received.args[:2], rank * local, (rank + 1) * local, *received.args[4:])
    return copy


def _resize(count: TokenCount) -> Callable[[Node, tuple[Any, ...]], tuple[Any, ...]]:
    def resize(node: Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if any(isinstance(value(n), torch.SymInt) for n in node.all_input_nodes):
            return args  # a size of the run's own, whatever number it is
        if node.target is ops.unpermute.default:
            rows, row_map, weights, sizes, *others = args
            return (rows, row_map, weights, [count.size(sizes[0]), *sizes[1:]], *others)
        if node.target is ops.permute.default and len(args) > 2 and args[2] is not None:
            return (*args[:2], count.size(args[2]))
        return count.resize(node, args)

    return resize


def _is_size(node: Node) -> bool:
    """A size and what is asserted of it, or an item of a tuple that nothing reads."""
    return node.target is aten.sym_size.int or not node.users


def _item(node: Node, index: int) -> Node | None:
    items = (n for n in node.users if n.target is operator.getitem and n.args[1] == index)
    return next(items, None)


def _pairs(ids: Node) -> Any:
    tokens, top_k = shape(ids)
    return tokens * top_k


def _place_in_sizes(node: Any) -> tuple[Node, int] | None:
    """(the ``checked_sizes`` node, 0 for sizes sent and 1 for sizes received)."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return None
    unbound, index = node.args
    if not isinstance(unbound, Node) or unbound.target is not aten.unbind.int:
        return None
    chunk = unbound.args[0]
    if not isinstance(chunk, Node) or chunk.target is not aten.select.int:
        return None
    source = chunk.args[0]
    return (source, int(index)) if isinstance(source, Node) and index in (0, 1) else None  # type: ignore[arg-type]
