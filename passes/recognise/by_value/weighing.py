"""Which of a router's values weigh the experts' rows, found and proved by value.

Contract. ``prove(trials, …)`` returns the `Weighing` with which the weighted sum of the body's rows
is the captured result, in every trial, and what each input's effect on both was (`power.py`).
Raises `Refusal` saying by how much the nearest one missed. A trial whose result is not finite, or
the same everywhere, shows nothing and counts for nothing.

Pseudo-code::

    pairs = body(tokens of each pair, its expert)
    for each value of the router that has an entry per pair, or per token and expert (latest first):
        equal(result, base + sum(value * pairs)), or with the value on the tokens -> that is it
    the same, times a mask of pairs (what a capacity drops)
    in every further trial: equal, or Refusal
    each input changed alone: both change, and alike, or Refusal
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import same, shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.compare import not_finite, relative_errors
from moe_fx.passes.recognise.by_value.power import changes_of
from moe_fx.passes.recognise.by_value.rows.layout import Body
from moe_fx.passes.recognise.by_value.samples import Ids, Sample, Samples, Shape, Weighing
from moe_fx.passes.recognise.by_value.trials import Trials
from moe_fx.passes.roles import Selection

_MASKS = 4
_SMALL = 1 << 20


@dataclass(frozen=True)
class Proof:
    """weighing: what was found. changes: each input that is read, and the largest change of the
    result, relative to its largest entry, when it was changed alone."""

    weighing: Weighing
    changes: dict[Node, float]


def prove(trials: Trials, ids: Ids, body: Body, base: Node | None, training: bool) -> Proof:
    if trials.exact and not _runs_exactly(trials):
        trials.exact = False
    samples = Samples(trials, ids, body, base)
    tolerance = samples.tolerance
    missed: tuple[float, str] | None = None
    for weighing in _weighings(trials, body):
        miss = samples.miss(weighing)
        if miss is None:
            changes = changes_of(samples, weighing)
            if training:
                _check_gradients(trials, ids, body, base, weighing, tolerance)
            return Proof(replace(weighing, guarded=samples.beyond), changes)
        if missed is None or samples.got_further(miss, missed):
            missed = miss
    assert missed is not None
    if samples.selects_beyond(missed[1]):
        experts = trials.selection.num_experts
        raise Refusal(f"ids beyond the {experts} experts are selected", trials.result, 6)
    error = missed[0]
    differs = f"relative difference {error:.1e}" if math.isfinite(error) else "another shape"
    raise Refusal(
        f"the result is not the weighted sum of the experts' rows: {differs} at the least, "
        f"with {missed[1]}",
        trials.result,
        6,
    )


def _runs_exactly(trials: Trials) -> bool:
    """Whether all ops take float64 (some of other libraries do not)."""
    try:
        trials.run(trials.cases[0])
    except Refusal:
        return False
    return True


def _weighings(trials: Trials, body: Body) -> Iterator[Weighing]:
    plain = list(_candidates(trials))
    yield from plain
    if body.weighed:
        yield from (replace(w, before=True) for w in plain if w.node is not None)
    for mask in islice(_pair_masks(trials), _MASKS):
        yield from (replace(w, mask=mask) for w in plain if w.node is not None)


def _candidates(trials: Trials) -> Iterator[Weighing]:
    selection = trials.selection
    for node in reversed([*trials.inputs, *trials.nodes]):
        if not isinstance(value(node), Tensor) or trials.around.what(node) != "route":
            continue
        if value(node).dtype.is_floating_point:
            kind = _shape_of(node, selection)
            if kind is not None:
                yield Weighing(node, kind)
    yield Weighing(None, "ones")


def _shape_of(node: Node, selection: Selection) -> Shape | None:
    dims, lead = shape(node), selection.lead or (selection.num_tokens,)
    if _is_per_pair(node, selection):
        return "pairs"
    experts = max(selection.num_experts, selection.columns)
    tokens = selection.num_tokens
    if len(dims) >= 2 and same(dims[-1], experts) and _counts(dims[:-1], tokens):
        return "experts"
    if len(dims) == 2 and same(dims[0], experts) and same(dims[1], tokens):
        return "experts first"
    if len(dims) == len(lead) + 2 and same(dims[-2], experts) and _counts(dims[:-2], tokens):
        return "places"
    return None


def _is_per_pair(node: Node, selection: Selection) -> bool:
    dims = shape(node)
    return bool(dims) and (
        _counts(dims, selection.num_pairs)
        and (
            same(dims[-1], selection.top_k)
            or same(dims[-1], 1)
            or len(dims) == 1
            or selection.top_k == 1
        )
    )


def _counts(dims: tuple[object, ...], total: object) -> bool:
    product: object = 1
    for size in dims:
        product = product * size  # type: ignore[operator]
    return same(product, total)


def _pair_masks(trials: Trials) -> Iterator[Node]:
    for node in reversed(trials.nodes):
        val = value(node)
        if (
            isinstance(val, Tensor)
            and trials.around.what(node) == "route"
            and val.dtype == torch.bool
            and _is_per_pair(node, trials.selection)
        ):
            yield node


def _check_gradients(
    trials: Trials, ids: Ids, body: Body, base: Node | None, weighing: Weighing, tolerance: float
) -> None:
    """Of tokens, logits and small parameters: those of the graph and of the reading are equal."""
    with torch.enable_grad():
        values = trials.run(trials.cases[0], gradients=True)
        sample = Sample(trials, ids, body, base, values)
        if not sample.expected.requires_grad:
            return  # the layer is under torch.no_grad, as what takes its place will be
        leaves = {
            node: values[node]
            for node in trials.inputs
            if isinstance(values[node], Tensor)
            and values[node].requires_grad
            and values[node].numel() <= _SMALL
        }
        found = sample.found(weighing)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(found.shape, generator=generator).to(found.dtype)
        theirs, ours = (
            torch.autograd.grad(
                (out * cotangent).sum(),
                list(leaves.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for out in (sample.expected, found)
        )
    at = not_finite(theirs)
    if at is not None:
        reason = f"unproved: the layer's gradient of {list(leaves)[at]} is not finite in the trials"
        raise Refusal(reason, trials.result, 6)
    for node, error in zip(leaves, relative_errors(theirs, ours), strict=True):
        if error > 10 * tolerance:
            raise Refusal(
                f"the gradient of {node} is not that of a weighted sum of the experts' rows: "
                f"relative difference {error:.1e}",
                trials.result,
                6,
            )
