"""Where a table of experts comes from, and what its experts' owner can compute of it alone.

Contract. ``trace(tables, E)`` follows each table ``[E, ...]`` up through ops that make an expert's
block of their result from the same expert's blocks (`per_expert.py`), until there is nothing left
to cut: shards that are gathered (the owner has its block already), parameters and other tensors
with a block per expert, of which the owner takes a slice, and tensors that all experts read, which
it takes whole. Raises `Refusal` where a gather of experts' shards cannot be done without: the
node that mixes experts is named, or the op of which nothing is known.

A table that stacks E tensors (the experts of a list or of a loop) is cut by leaving the others'
out. What such a member is made of belongs to one expert; ``entry[e]`` of a table, ``unbind``,
``split`` or ``chunk``, is the owner's entry ``e - first``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.gathers import chain, gather_of
from moe_fx.graph.nodes import argument, same, shape, tensor_inputs, value
from moe_fx.graph.per_expert import cut_inputs
from moe_fx.graph.refusal import Refusal
from moe_fx.region import Gather

aten = torch.ops.aten

PROGRESS = 5


@dataclass
class Lineage:
    """steps: op -> its inputs that are cut with it; stacks: table -> its E members; members: op ->
    the one expert that it belongs to; pieces: splits that such ops read; sliced: tensors of which
    the owner takes its blocks; whole: tensors that all experts read; gathers: by the node that
    holds their result."""

    experts: int
    steps: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    stacks: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    members: dict[Node, int] = field(default_factory=dict)
    pieces: dict[Node, None] = field(default_factory=dict)
    sliced: dict[Node, None] = field(default_factory=dict)
    whole: dict[Node, None] = field(default_factory=dict)
    gathers: dict[Node, Gather] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """The ops between the tables and what they come from, gathers included, in graph order."""
        links = [node for gather in self.gathers.values() for node in chain(gather)]
        found = {*self.steps, *self.stacks, *self.members, *self.pieces, *links}
        return sorted(found)


def trace(tables: Iterable[Node], experts: int, others: Iterable[Node] = ()) -> Lineage:
    """others: what the experts' rows meet besides, whole."""
    tracer = _Tracer(Lineage(experts))
    for table in tables:
        tracer.table(table)
    tracer.found.whole |= dict.fromkeys(others)
    tracer.check_whole()
    return tracer.found


@dataclass(frozen=True)
class Entry:
    """``op`` picks expert ``expert`` of ``source``, without the dim that counts experts or with
    ``rows`` entries of it."""

    source: Node
    expert: int
    rows: int | None


def entry_of(node: Node, experts: int) -> Entry | None:
    """The expert whose entry or block of another tensor ``node`` is."""
    if node.target is aten.select.int:
        whole, dim, at = node.args
        if dim == 0 and isinstance(at, int) and same(shape(whole)[0], experts):
            return Entry(whole, at % experts, None)  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor and argument(node, 1, "dim", 0) == 0:
        source: Any = node.args[0]
        total, first = shape(source)[0], argument(node, 2, "start")
        rows = total // experts if isinstance(total, int) and total % experts == 0 else 0
        begins = isinstance(first, int) and rows and 0 <= first < total and first % rows == 0
        if begins and argument(node, 4, "step", 1) == 1 and same(shape(node)[0], rows):
            return Entry(source, first // rows, rows)
    if node.target is operator.getitem:
        pieces, at = node.args
        return _piece(pieces, at, experts) if isinstance(at, int) else None
    return None


def _piece(pieces: Any, at: int, experts: int) -> Entry | None:
    if pieces.target is aten.unbind.int and argument(pieces, 1, "dim", 0) == 0:
        if len(value(pieces)) == experts:
            return Entry(pieces.args[0], at % experts, None)
    elif pieces.target in _SPLITS and argument(pieces, 2, "dim", 0) == 0:
        sizes = {str(piece.shape[0]) for piece in value(pieces)}
        if len(value(pieces)) == experts and len(sizes) == 1:
            return Entry(pieces.args[0], at % experts, value(pieces)[0].shape[0])
    return None


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def _of_whole_experts(gather: Gather, experts: int) -> bool:
    """Whether every rank's shard has whole experts' rows only. A shard that was filled up has a row
    an expert."""
    if gather.full.target is aten.slice.Tensor:
        return same(shape(gather.full)[0], experts)
    return experts % gather.world_size == 0


class _Tracer:
    def __init__(self, found: Lineage) -> None:
        self.found = found
        self._gathered: dict[Node, dict[Node, Gather]] = {}

    def table(self, table: Node) -> None:
        """Iterative, since a stack may have many members."""
        found, stack = self.found, [table]
        while stack:
            node = stack.pop()
            if node in found.steps or node in found.stacks or node in found.gathers:
                continue
            gather = gather_of(node)
            if gather is not None:
                if gather.world_size > 1 and not _of_whole_experts(gather, found.experts):
                    raise Refusal(f"{node} gathers parts of experts", node, PROGRESS)
                found.gathers[node] = gather
                continue
            members = self._members(node)
            if members is not None:
                found.stacks[node] = members
                for expert, member in enumerate(members):
                    stack += self._member(member, expert)
                continue
            cut = cut_inputs(node, found.experts)
            if cut is None:
                self._slice(node)
                continue
            found.steps[node] = cut
            stack += cut
            found.whole |= dict.fromkeys(n for n in tensor_inputs(node) if n not in cut)

    def _members(self, node: Node) -> tuple[Node, ...] | None:
        """The experts' own tensors that ``node`` stacks, one after the other."""
        if node.target is aten.stack.default and argument(node, 1, "dim", 0) == 0:
            members: Any = node.args[0]
        elif node.target is aten.cat.default and argument(node, 1, "dim", 0) == 0:
            members = node.args[0]
            if len({str(shape(member)) for member in members}) != 1:
                return None
        else:
            return None
        return tuple(members) if len(members) == self.found.experts else None

    def _slice(self, node: Node) -> None:
        gather = next(iter(self.gathers_above(node)), None)
        if gather is not None:
            raise Refusal(self._mixed(node, gather), node, PROGRESS)
        self.found.sliced[node] = None

    def _mixed(self, node: Node, gather: Node) -> str:
        return (
            f"{node.target} ({node.name}) is not known to keep experts apart, but what it makes of "
            f"the gathered {gather.name} is a table of experts: no rank could make its own "
            "experts' part of its shard"
        )

    def _member(self, member: Node, expert: int) -> list[Node]:
        """Notes what ``member``, of one expert, is made of; gives the tables it is an entry of."""
        found, stack, tables = self.found, [(member, member)], []
        while stack:
            node, reader = stack.pop()
            if not self.gathers_above(node) or found.members.get(node) == expert:
                continue
            if node in found.members:
                raise Refusal(f"{node} is part of several experts' tables", node, PROGRESS)
            if gather_of(node) is not None:
                self._require_common(node, reader)
                continue
            entry = entry_of(node, found.experts)
            if entry is None:
                stack += [(source, node) for source in node.all_input_nodes]
            elif entry.expert == expert:
                tables.append(entry.source)
            else:
                reason = f"{node} is of expert {entry.expert}, but part of expert {expert}'s table"
                raise Refusal(reason, node, PROGRESS)
            found.members[node] = expert
            if node.target is operator.getitem:
                found.pieces[node.all_input_nodes[0]] = None
        return tables

    def check_whole(self) -> None:
        for node in self.found.whole:
            for full in self.gathers_above(node):
                self._require_common(full, node)

    def _require_common(self, full: Node, reader: Node) -> None:
        """What all experts read may be gathered (parts of a common matrix), but not from experts.
        reader: what is made of it."""
        if full in self.found.gathers or same(shape(full)[0], self.found.experts):
            raise Refusal(
                f"{reader.name} ({reader.target}) mixes experts that are gathered from all ranks "
                f"({full.name}), and the experts' result is computed from it",
                reader,
                PROGRESS,
            )

    def gathers_above(self, node: Node) -> dict[Node, Gather]:
        """Gathers over several ranks that ``node`` is computed from, ``node`` included."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._gathered:
                stack.pop()
                continue
            own = gather_of(current)
            missing = [n for n in current.all_input_nodes if n not in self._gathered]
            if own is None and missing:
                stack += missing
                continue
            stack.pop()
            gathers = {} if own is None or own.world_size == 1 else {current: own}
            if own is None:
                for source in current.all_input_nodes:
                    gathers |= self._gathered[source]
            self._gathered[current] = gathers
        return self._gathered[node]
