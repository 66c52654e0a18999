"""Verify: before a rewrite is accepted, original and replacement must agree by value.

Contract. In: recognised regions and their plans. Out: those that agreed, marked ``verified``; the
others are declined with what was seen. A region whose fused experts did not agree is planned
without, and tried again. The graph is not changed.

Pseudo-code, for one region::

    take the region out; make its replacement with the very code that will rewrite the graph,
    one per rank
    for each adversarial routing: run original and replacement on all ranks in lock step (real
    collectives replaced by slicing), on random tokens and weights; outputs must be close, and, in
    a graph captured for training, so must the gradients of all floating inputs
    each input changed alone (`rank_values.py`): both must change, and alike; a result that is not
    finite or the same everywhere shows nothing

The replacement is thus checked with its exchange, its split into local experts, its order of
experts, cuts through experts of any size, and room for all rows: what overflows by
``capacity_factor`` is not the pass's to say.
Equal regions (same graph, shapes and plan) are verified once, unless ``verify="always"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from moe_fx.graph.copy import copy_graph
from moe_fx.graph.nodes import shape, value
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.evaluate import simulate
from moe_fx.passes.evaluate.compare import SEEN, not_finite, relative_errors, tells
from moe_fx.passes.evaluate.extract import Extract, extract_region, structure, translate
from moe_fx.passes.evaluate.gradients import (
    Leaf,
    NotDifferentiable,
    choose_leaves,
    cut_at,
    gradient_cuts,
    run_with_gradients,
)
from moe_fx.passes.evaluate.on_host import reference_ops
from moe_fx.passes.evaluate.sizes import concrete
from moe_fx.passes.plan.fuse_experts import unfused
from moe_fx.passes.rewrite.rewrite import rewrite_region
from moe_fx.passes.verify.rank_values import RankValues, kind_of_input, name_of_input
from moe_fx.plan import ExchangePlan
from moe_fx.region import Declined, Effect, Region, Verification, source_of

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_WEIGHT_BUDGET_BYTES = 1 << 28
_WAYS = 4
"""Other values of an input that are tried, until its effect is seen."""


class Verify(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        if context.options.verify == "off":
            return PassResult(module, changed=False)
        tried = _Tried(context.options.verify == "always")
        kept: list[tuple[Region, ExchangePlan]] = []
        for region, plan in zip(context.regions, context.plans, strict=True):
            alone, region_alone = extract_region(region)
            cuts = gradient_cuts(alone, region_alone) if context.training else None
            found = tried.find(alone, region_alone, plan, cuts)
            if isinstance(found, str) and plan.fused is not None:
                plan = unfused(region, plan, context.report, f"verification: {found}")
                found = tried.find(alone, region_alone, plan, cuts)
            if isinstance(found, str):
                combined = region.parts.combined
                context.report.declined.append(
                    Declined(found, combined.name, source_of(combined), region.form)
                )
            else:
                effects = (*region.effects, *_effects(alone, region_alone, found))
                verification = found.verification
                region = replace(region, verified=True, verification=verification, effects=effects)
                kept.append((region, plan))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)


class _Tried:
    """What was found of each region and plan; equal ones are tried once unless ``always``."""

    def __init__(self, always: bool) -> None:
        self.always = always
        self._found: dict[str, Verified | str] = {}

    def find(
        self, alone: Extract, region: Region, plan: ExchangePlan, cuts: frozenset[str] | None
    ) -> Verified | str:
        key = f"{structure(alone)}\n{region.parts.distinct}\n{plan}\n{cuts and sorted(cuts)}"
        if key not in self._found or self.always:
            roomy = replace(plan, capacity_factor=None, drop=False, least_rows=1)
            self._found[key] = difference(alone, region, roomy, cuts)
        return self._found[key]


def _effects(alone: Extract, region: Region, found: Verified) -> tuple[Effect, ...]:
    """region: that of the extracted nodes. ``found`` may be of an equal one with other names."""
    return tuple(
        Effect(name_of_input(alone, region, at), kind_of_input(alone, region, at), change)
        for at, change in found.changes.items()
    )


def difference(
    alone: Extract, region: Region, plan: ExchangePlan, cuts: frozenset[str] | None = None
) -> Verified | str:
    """What differs between the region and its replacement, or how it was seen that nothing does.
    cuts: gradients are compared too, none flowing through the nodes of these names."""
    try:
        return _Comparison(alone, region, plan, cuts).verified()
    except _Differs as differs:
        return str(differs)


@dataclass(frozen=True)
class Verified:
    """changes: by position of the extracted region's input, the largest change of the result,
    relative to its largest entry, when that input was changed alone."""

    verification: Verification
    changes: dict[int, float]


class _Differs(Exception):
    """Says what."""


class _Comparison:
    """The region beside its replacements, one a rank."""

    def __init__(
        self, alone: Extract, region: Region, plan: ExchangePlan, cuts: frozenset[str] | None
    ) -> None:
        ranks = range(plan.world_size)
        self.sides = {
            "the layer": [cut_at(alone.module, cuts or frozenset())] * plan.world_size,
            "the rewrite": [replacement(alone, region, replace(plan, rank=rank)) for rank in ranks],
        }
        held = 1 if cuts is None else plan.world_size
        self.values = RankValues(alone, region, plan, _token_count(region, held))
        self.overrides = reference_ops(alone.module)
        self.tolerance, self.world, self.trains = (
            _tolerance(region),
            plan.world_size,
            cuts is not None,
        )
        self.largest, self.largest_gradient = 0.0, 0.0
        self.compared: dict[str, None] = {}
        self.found: dict[str, list[Tensor]] = {}

    def verified(self) -> Verified:
        for seed, routing in enumerate(self.values.routings):
            self.found[routing] = self._same(
                routing, self.values.inputs(routing), self.trains, seed
            )
        telling = [routing for routing, results in self.found.items() if any(map(tells, results))]
        if not telling:
            raise _Differs(
                "unproved: in no trial was the layer's result finite and not the same everywhere"
            )
        changes = self._changes(telling)
        verification = Verification(
            tuple(self.found),
            self.world,
            self.largest,
            self.tolerance,
            tuple(self.compared),
            self.largest_gradient if self.compared else None,
        )
        return Verified(verification, changes)

    def _changes(self, telling: list[str]) -> dict[int, float]:
        changes: dict[int, float] = {}
        for group in self.values.groups:
            name, change = self._name(group[0]), 0.0
            for routing, again in product(telling, range(1, 1 + _WAYS)):
                inputs = self.values.inputs(routing, group, again)
                results = self._same(f"{routing}, {name} changed", inputs)
                change = max(change, _change(self.found[routing], results))
                if change > SEEN * self.tolerance:
                    break
            else:
                raise _Differs(
                    f"unproved: {name} was changed alone, and the layer's result by {change:.1e} "
                    "at most, which would not be seen"
                )
            changes |= dict.fromkeys(group, change)
        return changes

    def _name(self, at: int) -> str:
        return name_of_input(self.values.alone, self.values.region, at)

    def _same(
        self, what: str, inputs: list[list[Any]], gradients: bool = False, seed: int = 0
    ) -> list[Tensor]:
        """The layer's results by rank; raises `_Differs` unless they are the rewrite's."""
        leaves = choose_leaves(inputs) if gradients else []
        results = []
        for side, modules in self.sides.items():
            resize = [count.resize for count in self.values.counts]
            run = partial(simulate.run, modules, overrides=self.overrides, resize=resize)
            try:
                results.append(run_with_gradients(run, inputs, leaves, seed))
            except NotDifferentiable as error:
                raise _Differs(f"{side} cannot be differentiated with {what}: {error}") from None
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                reason = f"could not be verified with {what}: {type(error).__name__}: {error}"
                raise _Differs(reason) from None
        (expected, of_layer), (found, of_rewrite) = results
        for rank, ((left,), (right,)) in enumerate(zip(expected, found, strict=True)):
            if left.shape == right.shape and not bool(left.isfinite().all()):
                continue  # it shows nothing
            distance = _relative_error(left, right)
            if distance > self.tolerance:
                raise _Differs(
                    f"the rewrite changed the result with {what}: relative difference "
                    f"{distance:.1e} on rank {rank} of {self.world}"
                )
            self.largest = max(self.largest, distance)
        self._same_gradients(what, leaves, of_layer, of_rewrite)
        return [left for (left,) in expected]

    def _same_gradients(
        self, what: str, leaves: list[Leaf], expected: list[Tensor], found: list[Tensor]
    ) -> None:
        at = not_finite(expected)
        if at is not None:
            name = self._name(leaves[at].position)
            raise _Differs(f"unproved: the layer's gradient of {name} is not finite with {what}")
        distances = relative_errors(expected, found)
        for leaf, distance in zip(leaves, distances, strict=True):
            name = self._name(leaf.position)
            if distance > self.tolerance:
                where = "summed over" if leaf.rank is None else f"on rank {leaf.rank} of"
                raise _Differs(
                    f"the rewrite changed the gradient of {name} with {what}: relative difference "
                    f"{distance:.1e} {where} {self.world} ranks"
                )
            self.compared[name] = None
            self.largest_gradient = max(self.largest_gradient, distance)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change on a rank, relative to the largest entry there; of a result that shows
    something, to one that is finite."""
    changes = [0.0]
    for left, right in zip(before, after, strict=True):
        if tells(left) and bool(right.isfinite().all()):
            changes.append(_relative_error(left, right))
    return max(changes)


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
