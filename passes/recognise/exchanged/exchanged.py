"""Recognise programs that exchange tokens themselves: ``Region.program == "exchanged"``.

Contract. In: a normalised graph. Out: the same graph; regions that hold their exchange already are
in the report (not in ``context.regions``: nothing rewrites them), and ``context.claimed`` holds
their selections. Exchanges, counts, permutation and tables are bound as `ExchangedParts`.

Pseudo-code::

    all-to-all: for each exchange of rows d, the first exchange c that reads its result and has d's
        splits swapped; between them matmuls with tables [E / W, ...]; before d a sort of the ids of
        the nearest top-k; after c the first sum back to [T, ...]
    all-reduce: for each sum over the group whose operand comes from the nearest top-k through
        matmuls with tables [E / W, ...]: each rank did its own experts' share of all tokens

Rejects (declined): rows sent that no sort of selected ids put in order; results that never rejoin
the tokens; tables that do not hold E / W experts. An all-reduce without such tables is tensor
parallelism and no candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from moe_fx.compat import resolve_group
from moe_fx.graph.flow import Flow
from moe_fx.graph.names import activation_name, has_shared_expert
from moe_fx.graph.nodes import (
    VIEWS,
    is_grouped_matmul,
    is_integer,
    is_unary_rowwise,
    same,
    shape,
    value,
)
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.recognise.router.router import recognise_router
from moe_fx.passes.recognise.tables import is_matmul, weight_tables
from moe_fx.passes.roles import Selection
from moe_fx.region import Declined, Parts, Region, source_of

aten, collectives = torch.ops.aten, torch.ops._c10d_functional

_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_SUMS = (
    aten.sum.dim_IntList,
    aten.scatter_add.default,
    aten.index_add.default,
    aten.index_put.default,
    aten.bmm.default,
    aten.einsum.default,
)


@dataclass(frozen=True, kw_only=True)
class ExchangedParts(Parts):
    """The nodes of a region that holds its own exchange; see `Parts` for what is inherited.

    kind: "alltoall" (rows travel to the experts' ranks and back) or "allreduce" (every rank has all
    tokens; results are summed over ranks). dispatch, combine: the ops that start the exchanges (the
    same all-reduce twice). sort: what orders the rows by expert, hence by rank. sent_counts: rows
    per expert ``[E]`` or ``[W, E / W]``; received_counts: the same as exchanged. send_splits,
    receive_splits: rows to and from each rank, ints or symbols' nodes. The last five are None or
    empty for "allreduce" and for exchanges of equal splits.
    """

    kind: Literal["alltoall", "allreduce"]
    group_name: str
    world_size: int
    dispatch: Node
    combine: Node
    sort: Node | None
    sent_counts: Node | None
    received_counts: Node | None
    send_splits: tuple[Any, ...]
    receive_splits: tuple[Any, ...]


class Exchanged(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        graph = Flow(module)
        for candidate in (*_all_to_alls(graph), *_all_reduces(graph)):
            if candidate.select in context.claimed:
                continue
            try:
                region = candidate.bind()
            except Refusal as refusal:
                where = source_of(refusal.node) or source_of(candidate.select)
                context.report.declined.append(
                    Declined(refusal.reason, refusal.node.name, where, "exchanged")
                )
            else:
                context.report.regions.append(region)
            context.claimed |= graph.router_selections(candidate.select)
        return PassResult(module, changed=False)


@dataclass(frozen=True)
class _Candidate:
    """Two exchanges (or one all-reduce, as both) around experts, and the selection above."""

    flow: Flow
    kind: Literal["alltoall", "allreduce"]
    select: Node
    dispatch: Node
    combine: Node
    body: tuple[Node, ...]
    world_size: int

    @property
    def selection(self) -> Selection:
        scores, k = self.select.args[0], self.select.args[1]
        tokens, experts = shape(scores)
        if not isinstance(k, int) or not isinstance(experts, int):
            raise Refusal(
                "the number of experts or of selected experts is no constant", self.select
            )
        return Selection(
            self.select,
            tokens,
            experts,
            k,
            selectors=(self.select,),
            lead=(tokens,),
            columns=experts,
        )

    def bind(self) -> Region:
        """The region; raises `Refusal` for what a pair of exchanges must have and has not."""
        parts = (self._sent_rows if self.kind == "alltoall" else self._shared_rows)()
        selection = self.selection
        return Region(
            num_experts=selection.num_experts,
            top_k=selection.top_k,
            hidden_size=int(shape(parts.tokens)[-1]),
            router=recognise_router(selection, parts)[0],
            form=_form(parts.body),
            program="exchanged",
            activation=activation_name(parts.body),
            has_shared_expert=has_shared_expert(parts.combined, parts.tokens),
            source=source_of(self.select),
            input=parts.tokens.name,
            output=parts.combined.name,
            verified=False,
            parts=parts,
        )

    def _sent_rows(self) -> ExchangedParts:
        flow = self.flow
        rows = self.dispatch.args[0]
        assert isinstance(rows, Node)
        from_ids = flow.below(self.select) - {self.select}
        sorts = [n for n in flow.ordered(flow.above(rows) & from_ids) if n.target in _SORTS]
        if not sorts:
            raise Refusal("the rows sent are not put in order by a sort of selected ids", rows)
        ids = _through_views(sorts[-1].args[0])
        tokens = self._the_tokens(flow.above(rows) & from_ids, rows)
        combined = self._rejoined()
        receive, send = self.dispatch.args[1], self.dispatch.args[2]
        sent_counts, received_counts = self._counts(receive)
        return self._parts(
            tokens, ids, combined, sorts[-1], sent_counts, received_counts, send, receive
        )

    def _shared_rows(self) -> ExchangedParts:
        tokens = self._the_tokens(self.body, self.combine)
        ids = next((n for n in self.select.users if is_integer(n)), None)
        if ids is None:
            raise Refusal("nothing reads the selected ids", self.select)
        (combined,) = [n for n in self.combine.users if n.target is collectives.wait_tensor.default]
        return self._parts(tokens, ids, combined, None, None, None, (), ())

    def _parts(
        self,
        tokens: Node,
        ids: Node,
        combined: Node,
        sort: Node | None,
        sent_counts: Node | None,
        received_counts: Node | None,
        send: Any,
        receive: Any,
    ) -> ExchangedParts:
        flow = self.flow
        inside = flow.ordered(flow.below(ids) & flow.above(combined))
        cut = self.combine.args[0]
        assert isinstance(cut, Node)
        before = [n for n in inside if flow.position[n] <= flow.position[self.dispatch]]
        return ExchangedParts(
            select=self.select,
            tokens=tokens,
            ids=ids,
            weights=self._weights(combined),
            nodes=tuple(inside),
            dispatched=tuple(n for n in before if n in flow.below(tokens)),
            body=self.body,
            cut=cut,
            post=tuple(n for n in inside if flow.position[n] > flow.position[self.combine]),
            combined=combined,
            tables=_local_tables(self.body, self._local_experts(), self.combine),
            gathers=(),
            roles={},
            kind=self.kind,
            group_name=str(self.dispatch.args[-1]),
            world_size=self.world_size,
            dispatch=self.dispatch,
            combine=self.combine,
            sort=sort,
            sent_counts=sent_counts,
            received_counts=received_counts,
            send_splits=tuple(send),
            receive_splits=tuple(receive),
        )

    def _local_experts(self) -> int:
        experts, world = self.selection.num_experts, self.world_size
        if experts % world:
            raise Refusal(f"{experts} experts on {world} ranks", self.dispatch)
        return experts // world

    def _the_tokens(self, readers: Iterable[Node], where: Node) -> Node:
        """What ``readers`` read that has a row per token, as wide as what is exchanged, and that
        the selection does not come after."""
        from_ids, hidden = self.flow.below(self.select), shape(self.combine)[-1]
        roots = {
            _through_views(source): source
            for node in readers
            for source in node.all_input_nodes
            if source not in from_ids and source not in self.body
            if _holds_rows(source, self.selection.num_tokens, hidden)
        }
        if len(roots) != 1:
            names = ", ".join(sorted(n.name for n in roots)) or "none"
            raise Refusal(f"expected rows of one token tensor, found {names}", where)
        return next(iter(roots.values()))

    def _rejoined(self) -> Node:
        """The first sum after the way back that has one row per token."""
        hidden, tokens = shape(self.combine)[-1], self.selection.num_tokens
        for node in self.flow.ordered(self.flow.below(self.combine)):
            is_sum = node.target in _SUMS or (self.selection.top_k == 1 and node.target in VIEWS)
            if is_sum and _holds_rows(node, tokens, hidden):
                return node
        raise Refusal("the rows that come back are never summed to one per token", self.combine)

    def _weights(self, combined: Node) -> Node | None:
        """The router's ``[T, K]`` weights, before other ranks' slots are masked out."""
        selection = self.selection
        between = self.flow.below(self.select) & self.flow.above(combined)
        for node in reversed(self.flow.ordered(between)):
            dims = shape(node)
            fits = (
                len(dims) == 2
                and same(dims[0], selection.num_tokens)
                and dims[1] == (selection.top_k)
            )
            if (
                fits
                and value(node).is_floating_point()
                and node.target is not (aten.masked_fill.Scalar)
            ):
                return node
        return None

    def _counts(self, splits: Any) -> tuple[Node | None, Node | None]:
        """(counts sent, counts received) behind symbolic ``splits``."""
        symbols = [split for split in splits if isinstance(split, Node)]
        for node in reversed(self.flow.ordered(self.flow.above(*symbols) if symbols else ())):
            if node.target is collectives.all_to_all_single.default and is_integer(node):
                sent = node.args[0]
                assert isinstance(sent, Node)
                (waited, *_) = node.users
                return sent, waited
        return None, None


def _all_to_alls(flow: Flow) -> Iterator[_Candidate]:
    exchanges = [n for n in flow.calls(collectives.all_to_all_single.default) if not is_integer(n)]
    combines: set[Node] = set()
    for dispatch in exchanges:
        select = flow.selection_above(dispatch)
        if select is None or dispatch in combines:
            continue
        after = flow.below(dispatch)
        for combine in exchanges:
            if combine is dispatch or combine not in after or not _swapped(dispatch, combine):
                continue
            body = tuple(
                n
                for n in flow.ordered(after & flow.above(combine))
                if n not in (dispatch, combine) and n.target is not collectives.wait_tensor.default
            )
            if any(map(is_matmul, body)):
                combines.add(combine)
                world = len(dispatch.args[1])  # type: ignore[arg-type]
                yield _Candidate(flow, "alltoall", select, dispatch, combine, body, world)
            break


def _all_reduces(flow: Flow) -> Iterator[_Candidate]:
    for reduce in flow.calls(collectives.all_reduce.default):
        select = flow.selection_above(reduce)
        if select is None or reduce.args[1] != "sum":
            continue
        experts, world = shape(select.args[0])[1], resolve_group(str(reduce.args[2])).size()
        own = flow.above(reduce) - flow.above(select) - {reduce}
        body = tuple(n for n in flow.ordered(own) if n.op == "call_function")
        if not isinstance(experts, int) or experts % world or world == 1:
            continue
        if any(_holds(table, experts // world) for table in weight_tables(body)):
            yield _Candidate(flow, "allreduce", select, reduce, reduce, body, world)


def _swapped(dispatch: Node, combine: Node) -> bool:
    """The way back: same group, what was received is sent and what was sent is received."""

    def equal(left: Any, right: Any) -> bool:
        return len(left) == len(right) and all(
            a is b or same(value(a), value(b)) for a, b in zip(left, right, strict=True)
        )

    return (
        dispatch.args[3] == combine.args[3]
        and equal(dispatch.args[1], combine.args[2])
        and equal(dispatch.args[2], combine.args[1])
    )


def _holds(table: Node, experts: int) -> bool:
    return same(shape(table)[0], experts)


def _local_tables(body: Iterable[Node], local: int, where: Node) -> tuple[Node, ...]:
    tables = weight_tables(body)
    for table in tables:
        if not _holds(table, local):
            raise Refusal(
                f"the table {table} holds {shape(table)[0]} experts, expected {local} of this rank",
                table,
            )
    if not tables:
        raise Refusal(f"no matmul reads a table of this rank's {local} experts", where)
    return tuple(tables)


def _holds_rows(node: Node, rows: Any, width: Any) -> bool:
    dims = shape(node)
    return (
        len(dims) == 2
        and same(dims[0], rows)
        and same(dims[1], width)
        and value(node).is_floating_point()
    )


def _through_views(node: Any) -> Node:
    while isinstance(node, Node) and (node.target in VIEWS or _is_cast(node)):
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def _is_cast(node: Node) -> bool:
    return node.target is aten._to_copy.default and is_unary_rowwise(node)


def _form(body: Iterable[Node]) -> str:
    nodes = tuple(body)
    if any(map(is_grouped_matmul, nodes)):
        return "grouped_mm"
    return "batched_mm" if any(n.target is aten.bmm.default for n in nodes) else "dense"
