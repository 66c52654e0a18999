"""That a stand-in gives what the exchange gives: both run for every rank, in lock step, on random
values, and with each input changed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.graph.copy import copy_graph
from moe_fx.graph.nodes import shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.base import StandIn
from moe_fx.passes.evaluate import simulate
from moe_fx.passes.evaluate.compare import SEEN, tells
from moe_fx.passes.evaluate.extract import Extract, extract, structure
from moe_fx.passes.evaluate.on_host import reference_ops
from moe_fx.passes.evaluate.sizes import TokenCount, choose_token_count, concrete, example
from moe_fx.passes.evaluate.typical import drawn, kind_of
from moe_fx.passes.evaluate.uses import reads_values
from moe_fx.passes.recognise.exchanged.dispatcher_way import DispatcherWay

ops = torch.ops.moe_fx

_TOLERANCE = 1e-4
_COARSE_TOLERANCE = 6e-2
_TRIED_TOKENS = 5
_STEP = 1009  # from one input's seed to the next


def require_equal(found: DispatcherWay, stand_in: StandIn, proved: set[str]) -> None:
    """Raise `Refusal` unless both give the same on every rank, on random values. proved: what has
    been, by structure; equal layers are run once."""
    captured = extract(list(stand_in.replaced), [found.end])
    standing = extract(list(stand_in.nodes), [stand_in.result])
    pair = f"{structure(captured)}\n{structure(standing)}"
    if pair in proved:
        return
    tried = [
        choose_token_count(
            shape(found.ids)[0], found.top_k, found.num_experts, _TRIED_TOKENS - rank % 3
        )
        for rank in range(found.world)
    ]
    sides = (
        (captured, [_of_rank(found, captured, rank) for rank in range(found.world)]),
        (standing, [standing.module] * found.world),
    )
    inputs = tuple(dict.fromkeys((*captured.inputs, *standing.inputs)))
    before = _equal_results(found, stand_in, sides, tried, _values(found, stand_in, inputs, tried))
    for node in inputs:
        if kind_of(node) in ("size", "constant") or not any(map(reads_values, node.users)):
            continue
        changed = _values(found, stand_in, inputs, tried, node)
        after = _equal_results(found, stand_in, sides, tried, changed)
        if not any(_distance(a, b) > SEEN * _tolerance(found) for a, b in _telling(before, after)):
            reason = f"unproved: {node} was changed alone, and no change of the result was seen"
            raise Refusal(reason, found.end)
    proved.add(pair)


def _equal_results(
    found: DispatcherWay,
    stand_in: StandIn,
    sides: Sequence[tuple[Extract, list[GraphModule]]],
    tried: list[TokenCount],
    per_rank: list[dict[Node, Any]],
) -> list[Tensor]:
    """The result by rank; raises `Refusal` unless both sides give it."""
    results = []
    for side, modules in sides:
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
    for (left,), (right,) in zip(*results, strict=True):
        if not _distance(left, right) <= _tolerance(found):
            raise Refusal("with the experts of all ranks the result is another", found.end)
    return [left for (left,) in results[0]]


def _tolerance(found: DispatcherWay) -> float:
    coarse = value(found.tokens).dtype in (torch.float16, torch.bfloat16)
    return _COARSE_TOLERANCE if coarse else _TOLERANCE


def _distance(left: Tensor, right: Tensor) -> float:
    if not left.numel():
        return 0.0
    return float((left.double() - right.double()).abs().max() / left.abs().max().clamp(min=1e-6))


def _telling(before: list[Tensor], after: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((a, b) for a, b in zip(before, after, strict=True) if tells(a) and tells(b))


def _values(
    found: DispatcherWay,
    stand_in: StandIn,
    inputs: Sequence[Node],
    tried: Sequence[TokenCount],
    changed: Node | None = None,
) -> list[dict[Node, Any]]:
    """By rank and input of either graph: tokens and tables of a rank's own, all else in common.
    changed: the input that gets another value."""
    shared: dict[Node, Any] = {}
    per_rank = []
    for rank, count in enumerate(tried):
        values: dict[Node, Any] = {}
        for at, node in enumerate(inputs):
            again, seed = int(node is changed), _STEP * (at + 1) + rank
            if node is found.ids:
                generator = torch.Generator().manual_seed(seed + again * _STEP // 2)
                scores = torch.rand(count.wanted, found.num_experts, generator=generator)
                ids = scores.argsort(1)[:, : found.top_k]
                values[node] = ids.contiguous().to(value(node).dtype)
            elif node in found.inputs:
                values[node] = example(node, count, seed, per_token=True, again=again)
            elif node in stand_in.shards:
                sizes = [concrete(size) for size in shape(node)]
                values[node] = drawn(node, sizes, seed, again=again, weight=True)
            elif isinstance(value(node), Tensor):
                if node not in shared:
                    shared[node] = example(node, count, seed, again=again)
                values[node] = shared[node]
            else:
                values[node] = example(node, count, seed, again=again)
        per_rank.append(values)
    return per_rank


def _of_rank(found: DispatcherWay, captured: Extract, rank: int) -> GraphModule:
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
