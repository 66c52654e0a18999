"""Verify: before a rewrite is accepted, original and replacement must agree by value.

Contract. In: recognised regions and their plans. Out: those that agreed, marked ``verified``; the
others are declined with what was seen. The graph is not changed.

Pseudo-code, for one region::

    take the region out; make its replacement with the very code that will rewrite the graph,
    one per rank
    for each adversarial routing: run original and replacement on all ranks in lock step (real
    collectives replaced by slicing), on random tokens and weights; outputs must be close, and, in
    a graph captured for training, so must the gradients of all floating inputs

The replacement is thus checked with its exchange, its split into local experts, its order of
experts, cuts through experts of any size, and room for all rows: what overflows by
``capacity_factor`` is not the pass's to say.
Equal regions (same graph, shapes and plan) are verified once, unless ``verify="always"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx import simulate
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.extract import Extract, extract_region, structure, translate
from moe_fx.passes.gradients import (
    NotDifferentiable,
    choose_leaves,
    cut_at,
    gradient_cuts,
    relative_errors,
    run_with_gradients,
)
from moe_fx.passes.normalise import copy_graph
from moe_fx.passes.on_host import reference_ops
from moe_fx.passes.rewrite import rewrite_region
from moe_fx.passes.roles import PerToken, shape, value
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
            cuts = gradient_cuts(alone, region_alone) if context.training else None
            key = f"{structure(alone)}\n{region.parts.distinct}\n{plan}\n{cuts and sorted(cuts)}"
            if key not in seen or context.options.verify == "always":
                roomy = replace(plan, capacity_factor=None, drop=False, least_rows=1)
                seen[key] = difference(alone, region_alone, roomy, cuts)
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


def difference(
    alone: Extract, region: Region, plan: ExchangePlan, cuts: frozenset[str] | None = None
) -> Verification | str:
    """What differs between the region and its replacement, or how it was seen that nothing does.
    cuts: gradients are compared too, none flowing through the nodes of these names."""
    ranks = range(plan.world_size)
    rewritten = [replacement(alone, region, replace(plan, rank=rank)) for rank in ranks]
    original = [cut_at(alone.module, cuts or frozenset())] * plan.world_size
    overrides = reference_ops(alone.module)
    tolerance = _tolerance(region)
    routings: list[str] = []
    compared: dict[str, None] = {}
    largest, largest_gradient = 0.0, 0.0
    held = 1 if cuts is None else plan.world_size
    for what, counts, inputs in _trials(alone, region, plan, _token_count(region, held)):
        resize = [count.resize for count in counts]
        leaves = [] if cuts is None else choose_leaves(inputs)
        results = []
        for side, modules in (("the layer", original), ("the rewrite", rewritten)):
            run = partial(simulate.run, modules, overrides=overrides, resize=resize)
            try:
                results.append(run_with_gradients(run, inputs, leaves, seed=len(routings)))
            except NotDifferentiable as error:
                return f"{side} cannot be differentiated with {what}: {error}"
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                return f"could not be verified with {what}: {type(error).__name__}: {error}"
        (expected, gradients), (found, found_gradients) = results
        for rank, ((left,), (right,)) in enumerate(zip(expected, found, strict=True)):
            distance = _relative_error(left, right)
            if distance > tolerance:
                return (
                    f"the rewrite changed the result with {what}: relative difference "
                    f"{distance:.1e} on rank {rank} of {plan.world_size}"
                )
            largest = max(largest, distance)
        distances = relative_errors(gradients, found_gradients)
        for leaf, distance in zip(leaves, distances, strict=True):
            name = _role(alone.copies[alone.inputs[leaf.position]], region)
            if distance > tolerance:
                where = "summed over" if leaf.rank is None else f"on rank {leaf.rank} of"
                return (
                    f"the rewrite changed the gradient of {name} with {what}: relative difference "
                    f"{distance:.1e} {where} {plan.world_size} ranks"
                )
            compared[name] = None
            largest_gradient = max(largest_gradient, distance)
        routings.append(what)
    return Verification(
        tuple(routings),
        plan.world_size,
        largest,
        tolerance,
        tuple(compared),
        largest_gradient if compared else None,
    )


def _role(node: Node, region: Region) -> str:
    """What an input of the extracted region is called in a report."""
    if node is region.parts.tokens:
        return "tokens"
    return "weights" if node is region.parts.weights else node.name


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
    alone: Extract, region: Region, plan: ExchangePlan, base: int
) -> Iterator[tuple[str, list[TokenCount], list[list[Any]]]]:
    generator = torch.Generator().manual_seed(0)
    tables = _tables(alone, region, plan, generator)
    experts = region.num_experts
    routings = _routings(region, generator)
    for what, routing in routings.items():
        counts = [
            choose_token_count(
                shape(region.parts.tokens)[0],
                region.top_k,
                experts,
                base if plan.even else max(1, base - rank % 3),
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


def _token_count(region: Region, held: int) -> int:
    """Few tokens, fewer where each row needs its own copy of large weights. held: for so many
    ranks these are in memory at once; autograd keeps them."""
    if region.form != "batched_mm":
        return 5
    largest = max(
        concrete(shape(t)[1]) * concrete(shape(t)[-1]) * value(t).element_size()
        for t in region.parts.tables
    )
    return max(1, min(5, _WEIGHT_BUDGET_BYTES // (largest * region.top_k * held)))


def _relative_error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = (expected.double() - found.double()).abs().max()
    relative = float(error / expected.double().abs().max().clamp_min(1e-30))
    return relative if relative == relative else float("inf")
