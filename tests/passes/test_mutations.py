"""One node of a real block's graph is changed: the rewrite must compute what the changed one does.

A changed graph is a program like any other. Either the passes decline it, or the result of the
rewrite equals the *changed* graph's, on one device and on two ranks, with and without verification.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from moe_fx.errors import MoeFxError
from moe_fx.passes.normalise import copy_graph
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    relative_error,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)

aten = torch.ops.aten
CLOSE = 1e-4  # a changed graph may be ill-conditioned
WORLDS = (1, 2)
CASES = (
    ("qwen3_moe", "grouped_mm"),
    ("qwen3_moe", "batched_mm"),
    ("deepseek_v3", "grouped_mm"),
    ("gpt_oss", "grouped_mm"),
)

LIMIT = 60  # changes to each graph; all of them, over a thousand, take a minute and a half

Change = Callable[[Graph, Node], None]


@dataclass(frozen=True)
class Mutation:
    """``change`` is made to the node called ``node``."""

    node: str
    label: str
    change: Change

    def __str__(self) -> str:
        return f"{self.node}: {self.label}"


# -- changes ---------------------------------------------------------------------------------------


def _named(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.name == name)


def _in(graph: Graph, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` of a node of the original graph, for one of its copy."""
    return map_arg(args, lambda node: _named(graph, node.name))  # type: ignore[return-value]


def with_args(*args: Any, target: Any = None, **kwargs: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.target = node.target if target is None else target
        node.args, node.kwargs = _in(graph, args), kwargs

    return change


def with_argument(position: int, value: Any) -> Change:
    """Other arguments stay; those before it that were left out get their defaults."""

    def change(graph: Graph, node: Node) -> None:
        missing = node.target._schema.arguments[len(node.args) : position]  # type: ignore[union-attr]
        args = [*node.args, *(argument.default_value for argument in missing)]
        node.args = (*args[:position], value, *args[position + 1 :])

    return change


def with_keyword(name: str, value: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.kwargs = {**node.kwargs, name: value}

    return change


def with_target(target: Any) -> Change:
    def change(graph: Graph, node: Node) -> None:
        node.target = target

    return change


def with_inputs_swapped(graph: Graph, node: Node) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


def without(graph: Graph, node: Node) -> None:
    """Its users read its first input instead."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)


def followed_by(*ops: tuple[Any, ...]) -> Change:
    """Its users read ``op(node, *args)`` instead, or of several ops one after the other."""

    def change(graph: Graph, node: Node) -> None:
        users = list(node.users)
        result, after = node, node
        for op, *args in ops:
            with graph.inserting_after(after):
                result = graph.call_function(op, (result, *_in(graph, tuple(args))))
            after = result
        for user in users:
            user.replace_input_with(node, result)

    return change


def reading(other: str, source: str) -> Change:
    """Reads another node in the place of an input."""

    def change(graph: Graph, node: Node) -> None:
        node.replace_input_with(_named(graph, source), _named(graph, other))

    return change


# -- which changes are made to which nodes ---------------------------------------------------------


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


def followed_by_input(op: Any, *args: Any) -> Change:
    """The first input passes through ``op`` first."""

    def change(graph: Graph, node: Node) -> None:
        with graph.inserting_before(node):
            first = graph.call_function(op, (node.args[0], *args))
        node.args = (first, *node.args[1:])

    return change


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
    return 7 if val.dim() == 2 or val.shape[0] == 8 else 23


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
    return (tuple(val.shape), val.dtype) if isinstance(val, Tensor) else None


# -- what becomes of them --------------------------------------------------------------------------


def mutated(module: GraphModule, mutation: Mutation, inputs: list[Any]) -> GraphModule | None:
    """The changed graph with shapes worked out anew, or None if it does not run."""
    copy = copy_graph(module)
    mutation.change(copy.graph, _named(copy.graph, mutation.node))
    copy.graph.eliminate_dead_code()
    copy.recompile()
    try:
        with torch.no_grad():
            copy(*inputs)
            FakeTensorProp(copy, FakeTensorMode()).propagate(*inputs)
    except (RuntimeError, IndexError, TypeError, ValueError, AssertionError):
        return None
    return copy


def outcome(case: Captured, mutation: Mutation, verify: str) -> str:
    """ "invalid", "declined", "equal", or what is wrong."""
    changed = mutated(case.module, mutation, case.inputs)
    if changed is None:
        return "invalid"
    inputs = [case.other_inputs(seed=20 + rank) for rank in range(max(WORLDS))]
    try:
        with torch.no_grad():
            expected = [changed(*values) for values in inputs]
    except (RuntimeError, IndexError):
        return "invalid"
    for world in WORLDS:
        graphs, report = rewritten_on_ranks(changed, world, verify)
        if graphs is None:
            return "declined" if report.declined else "declined without a reason"
        try:
            found = run_ranks(graphs, inputs[:world])
        except (RuntimeError, IndexError, MoeFxError) as error:
            return f"fails on {world} ranks: {error}"
        error = relative_error(expected[:world], found)
        if error > CLOSE:
            return f"wrong by {error:.1e} on {world} ranks"
    return "equal"


@cache
def case_of(family: str, form: str) -> Captured:
    return captured(block(family, form), tokens(1, 12, 64))


def table(case: Captured, chosen: Iterable[Mutation], verify: str) -> dict[Mutation, str]:
    outcomes = {mutation: outcome(case, mutation, verify) for mutation in chosen}
    for mutation, found in outcomes.items():
        print(f"{found:10} {mutation}")
    print(dict(Counter(outcomes.values())))
    return outcomes


def wrong(outcomes: dict[Mutation, str]) -> dict[str, str]:
    fine = ("equal", "declined", "invalid")
    return {str(mutation): found for mutation, found in outcomes.items() if found not in fine}


@pytest.mark.parametrize(("family", "form"), CASES)
def test_structure_alone_accepts_no_changed_graph_as_another_program(
    family: str, form: str
) -> None:
    case = case_of(family, form)
    every = list(mutations(case.module))
    chosen = [m for m in every if "reads" not in m.label]
    chosen += [m for m in every if "reads" in m.label][::4]
    chosen = chosen[:: max(1, len(chosen) // LIMIT)]
    outcomes = table(case, chosen, verify="off")
    assert wrong(outcomes) == {}
    counts = Counter(outcomes.values())
    assert counts["equal"] + counts["declined"] >= 45
    assert counts["declined"] >= 15


@pytest.mark.parametrize(("family", "form"), [("gpt_oss", "grouped_mm")])
def test_verification_accepts_no_changed_graph_as_another_program(family: str, form: str) -> None:
    case = case_of(family, form)
    chosen = [m for m in mutations(case.module) if "reads" not in m.label][::4]
    outcomes = table(case, chosen, verify="compile")
    assert wrong(outcomes) == {}
    assert Counter(outcomes.values())["equal"] >= 15


EXPECTED = {
    "topk: lowest": "declined",
    "topk: over tokens": "invalid",
    "topk: one more": "invalid",  # the sizes of views say two
    "getitem_1: one more": "equal",  # ids + 1: other ids dispatch
    "getitem: order reversed": "equal",  # weights of other tokens
    "softmax: over tokens": "equal",
    "sort: descending": "declined",
    "sort: of negated ids": "declined",
    "sort: of ids modulo 4": "declined",
    "floor_divide: by one more": "declined",
    "floor_divide: remainder": "declined",
    "histc: wider bins": "declined",
    "histc: bins from one": "declined",
    "histc: bins to E": "equal",
    "cumsum: counts": "declined",
    "cumsum: summed twice": "declined",
    "cumsum: exclusive": "declined",
    "cumsum: order reversed": "declined",
    "split: over rows": "invalid",
    "getitem_4: the other item": "equal",
    "getitem_5: the other item": "equal",
    "mul: running sum over rows": "declined",
    "mul: order reversed": "declined",
    "mul: softmax over features": "equal",
    "mul_1: left out": "equal",
    "mul_1: twice": "equal",
    "mul_1: add": "equal",
    "transpose: order reversed": "equal",  # experts with each other's weights
    "transpose: left out": "equal",
    "index_1: order reversed": "declined",
    "arange: backwards": "declined",
    "index_put: inverse of the inverse": "declined",
    "index_2: reads getitem_3 for index_put": "declined",
    "sum_2: largest": "declined",
    "sum_2: other dim": "invalid",
}


def test_what_becomes_of_single_changes_to_a_qwen3_block() -> None:
    case = case_of("qwen3_moe", "grouped_mm")
    chosen = {str(m): m for m in mutations(case.module) if str(m) in EXPECTED}
    found = {name: outcome(case, mutation, "off") for name, mutation in chosen.items()}
    assert found == EXPECTED
