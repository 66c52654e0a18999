"""Verify: before a rewrite is accepted, original and replacement must agree by value.

Contract. In: recognised regions and their plans. Out: those that agreed, marked ``verified``; the
others are declined with what was seen. The graph is not changed.

Pseudo-code, for one region::

    take the region out; make its replacement with the very code that will rewrite the graph,
    one per rank
    for each adversarial routing: run original and replacement on all ranks in lock step (real
    collectives replaced by slicing), on random tokens and weights; outputs must be close

The replacement is thus checked with its exchange, its split into local experts and its order of
experts. Equal regions (same graph, shapes and plan) are verified once, unless ``verify="always"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx import simulate
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.extract import Extract, extract_region, structure, translate
from moe_fx.passes.normalise import copy_graph
from moe_fx.passes.rewrite import rewrite_region
from moe_fx.passes.roles import PerToken, is_grouped_matmul, shape, value
from moe_fx.passes.sizes import TokenCount, choose_token_count, concrete, example, random_tensor
from moe_fx.plan import ExchangePlan
from moe_fx.region import Declined, Region, Verification, source_of

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_WEIGHT_BUDGET_BYTES = 1 << 28


class Verify(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        if context.options.verify == "off":
            return PassResult(module, changed=False)
        seen: dict[str, Verification | str] = {}
        kept: list[tuple[Region, ExchangePlan]] = []
        for region, plan in zip(context.regions, context.plans, strict=True):
            alone, region_alone = extract_region(region)
            key = f"{structure(alone)}\n{region.parts.distinct}\n{plan}"
            if key not in seen or context.options.verify == "always":
                seen[key] = difference(alone, region_alone, plan)
            found = seen[key]
            if isinstance(found, str):
                combined = region.parts.combined
                context.report.declined.append(
                    Declined(found, combined.name, source_of(combined), region.form)
                )
            else:
                kept.append((replace(region, verified=True, verification=found), plan))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)


def difference(alone: Extract, region: Region, plan: ExchangePlan) -> Verification | str:
    """What differs between the region and its replacement, or how it was seen that nothing does."""
    rewritten = [replacement(alone, region, replace(plan, rank=r)) for r in range(plan.world_size)]
    original = [alone.module] * plan.world_size
    overrides = _reference_matmuls(alone.module)
    tolerance = _tolerance(region)
    routings: list[str] = []
    largest = 0.0
    for what, counts, inputs in _trials(alone, region, plan):
        resize = [count.resize for count in counts]
        try:
            expected = simulate.run(original, inputs, overrides, resize)
            found = simulate.run(rewritten, inputs, overrides, resize)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return f"could not be verified with {what}: {type(error).__name__}: {error}"
        for rank, ((left,), (right,)) in enumerate(zip(expected, found, strict=True)):
            distance = _relative_error(left, right)
            if distance > tolerance:
                return (
                    f"the rewrite changed the result with {what}: relative difference "
                    f"{distance:.1e} "
                    f"on rank {rank} of {plan.world_size}"
                )
            largest = max(largest, distance)
        routings.append(what)
    return Verification(tuple(routings), plan.world_size, largest, tolerance)


def _tolerance(region: Region) -> float:
    """That of the coarsest dtype the rows pass through: a result in float32 may come from
    experts in bfloat16."""
    parts = region.parts
    rows = (*parts.dispatched, *parts.body, *parts.post, parts.combined)
    dtypes = {value(node).dtype for node in rows if isinstance(value(node), Tensor)}
    return max((_TOLERANCE[dtype] for dtype in dtypes if dtype in _TOLERANCE), default=1e-4)


def replacement(alone: Extract, region: Region, plan: ExchangePlan) -> GraphModule:
    """A copy of the extracted region, rewritten. The copy keeps node order, so nodes are paired."""
    copy = copy_graph(alone.module)
    pairs = dict(zip(alone.module.graph.nodes, copy.graph.nodes, strict=True))
    moved = Extract(copy, alone.inputs, pairs)
    rewrite_region(copy.graph, _moved(region, moved), plan)
    copy.graph.eliminate_dead_code()
    return copy


def _moved(region: Region, to: Extract) -> Region:
    return replace(region, parts=translate(region.parts, to.copies))


def _trials(
    alone: Extract, region: Region, plan: ExchangePlan
) -> Iterator[tuple[str, list[TokenCount], list[list[Any]]]]:
    generator = torch.Generator().manual_seed(0)
    base = _token_count(region)
    tables = _tables(alone, region, plan, generator)
    experts = region.num_experts
    routings = _routings(region, generator)
    for what, routing in routings.items():
        counts = [
            choose_token_count(
                shape(region.parts.tokens)[0], region.top_k, experts, max(1, base - rank % 3)
            )
            for rank in range(plan.world_size)
        ]
        yield (
            what,
            counts,
            [
                _rank_inputs(alone, region, plan, tables, rank, counts[rank], routing, generator)
                for rank in range(plan.world_size)
            ],
        )


def _routings(region: Region, generator: torch.Generator) -> dict[str, Callable[[int], Tensor]]:
    """Adversarial ids ``[T, K]`` by number of tokens, such as the region's router can select: an
    expert comes up twice for a token only if the router may do that."""
    experts, k = region.num_experts, region.top_k
    routings: dict[str, Callable[[int], Tensor]] = {}
    if k <= experts:
        routings |= {
            "random routing": lambda n: torch.rand(n, experts, generator=generator).argsort(1)[
                :, :k
            ],
            "only the last experts": lambda n: torch.arange(experts).flip(0)[:k].repeat(n, 1),
            "only the first experts": lambda n: torch.arange(experts)[:k].repeat(n, 1),
        }
    if not region.parts.distinct:
        routings |= {
            "repeated experts": lambda n: torch.randint(experts, (n, k), generator=generator),
            "all tokens to one expert": lambda n: torch.full((n, k), experts - 1),
        }
    return routings


def _rank_inputs(
    alone: Extract,
    region: Region,
    plan: ExchangePlan,
    tables: dict[Node, Tensor],
    rank: int,
    count: TokenCount,
    routing: Callable[[int], Tensor],
    generator: torch.Generator,
) -> list[Any]:
    parts = region.parts
    shards = {gather.shard for gather in parts.gathers}
    inputs: list[Any] = []
    for original in alone.inputs:
        node = alone.copies[original]
        if node is parts.ids:
            inputs.append(routing(count.wanted).contiguous().to(value(node).dtype))
        elif node in shards:
            inputs.append(tables[node].chunk(plan.world_size)[rank])
        elif node in tables:
            inputs.append(tables[node])
        else:
            per_token = node in (parts.tokens, parts.weights) or isinstance(
                parts.roles.get(node), PerToken
            )
            inputs.append(example(original, count, generator, per_token=per_token))
    return inputs


def _tables(
    alone: Extract, region: Region, plan: ExchangePlan, generator: torch.Generator
) -> dict[Node, Tensor]:
    """What every rank has in common: all that does not vary with the tokens, whole."""
    parts = region.parts
    shards = {gather.shard for gather in parts.gathers}
    tables: dict[Node, Tensor] = {}
    for original in alone.inputs:
        node = alone.copies[original]
        dims = shape(node)
        token_data = (parts.tokens, parts.ids, parts.weights)
        if not dims or node in token_data or isinstance(parts.roles.get(node), PerToken):
            continue
        if node in shards or value(node).dtype.is_floating_point:
            sizes = [concrete(size) for size in dims]
            if node in shards:
                sizes[0] *= plan.world_size
            scale = max(1, sizes[-1]) ** -0.5
            table = random_tensor(sizes, value(node).dtype, generator)
            tables[node] = table * scale if table.is_contiguous() else table
    return tables


def _token_count(region: Region) -> int:
    """Few tokens, fewer where each row needs its own copy of large weights."""
    if region.form != "batched_mm":
        return 5
    largest = max(
        concrete(shape(t)[1]) * concrete(shape(t)[-1]) * value(t).element_size()
        for t in region.parts.tables
    )
    return max(1, min(5, _WEIGHT_BUDGET_BYTES // (largest * region.top_k)))


def _reference_matmuls(module: GraphModule) -> dict[Any, Any]:
    """Grouped matmuls by the book: strided test weights and unaligned sizes are no issue."""
    targets = {node.target for node in module.graph.nodes if is_grouped_matmul(node)}
    targets.add(torch.ops.moe_fx.grouped_mm.default)
    return dict.fromkeys(targets, _grouped_matmul)


def _grouped_matmul(_node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
    rows, weight, offsets = args
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    pieces = [
        rows[a:b] @ weight[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a
    ]
    empty = rows.new_zeros((0, weight.shape[2]))
    return torch.cat([empty, *pieces])


def _relative_error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = (expected.double() - found.double()).abs().max()
    relative = float(error / expected.double().abs().max().clamp_min(1e-30))
    return relative if relative == relative else float("inf")
