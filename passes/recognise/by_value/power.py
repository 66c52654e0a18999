"""The power of a proof: each input that a region reads is changed alone, and its effect looked at.

Contract. ``changes_of(samples, weighing)``: for each input, the largest change of the captured
result, relative to its largest entry, that changing this input alone made, where the reading's
result changed alike. Raises `Refusal` ("unproved") for an input whose effect was not seen: what is
equal whatever that input holds says nothing about it.

Pseudo-code::

    for the inputs of one kind (the same parameter of every expert) or for one input:
        change each alone, in one trial after the other, until the result changes by more than
        what counts as equal, or no trial is left -> Refusal
        all of them changed: the reading gives the captured result, or Refusal
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.compare import SEEN
from moe_fx.passes.evaluate.typical import kind_of
from moe_fx.passes.recognise.by_value.samples import Sample, Samples, Weighing
from moe_fx.passes.recognise.by_value.trials import Case

_WAYS = 4
"""Other values of an input that are tried, until its effect is seen."""
_CHECKED = 2
"""Other values of floats with which the reading must give the captured result."""
_CHECKED_DISCRETE = 8
"""The same of integers and bools."""


def changes_of(samples: Samples, weighing: Weighing) -> dict[Node, float]:
    changes: dict[Node, float] = {}
    for together in _alike(samples):
        unseen = dict.fromkeys(together, 0.0)
        checked = False
        for case, sample in _trials(samples):
            if not sample.tells:
                continue
            seen = _seen(samples, case, sample, unseen)
            if seen and not checked:
                _check(samples, weighing, case, sample, together)
                checked = True
            for group in seen:
                changes |= dict.fromkeys(group, unseen.pop(group))
            if not unseen:
                break
        if unseen:
            group, change = next(iter(unseen.items()))
            raise Refusal(
                f"unproved: {group[0]} was changed alone, and the result by {change:.1e} at most, "
                "which would not be seen",
                samples.trials.result,
                6,
            )
    return changes


def _seen(
    samples: Samples, case: Case, sample: Sample, unseen: dict[tuple[Node, ...], float]
) -> list[tuple[Node, ...]]:
    """Those of ``unseen`` whose effect is seen in this trial; ``unseen`` has their changes."""
    found = []
    for group in unseen:
        for again in range(1, 1 + _WAYS):
            after = samples.trials.rerun(case, sample.values, group, again)
            unseen[group] = max(unseen[group], sample.change(after))
            if unseen[group] > SEEN * samples.tolerance:
                found.append(group)
                break
    return found


def _check(
    samples: Samples,
    weighing: Weighing,
    case: Case,
    sample: Sample,
    together: list[tuple[Node, ...]],
) -> None:
    nodes = [node for group in together for node in group]
    discrete = any(kind_of(node) in ("integers", "bools") for node in nodes)
    for again in range(1, 1 + (_CHECKED_DISCRETE if discrete else _CHECKED)):
        after = samples.of(samples.trials.rerun(case, sample.values, nodes, again))
        error = after.error(weighing)
        samples.beyond |= after.valid is not None
        if error > samples.tolerance and after.valid is not None:
            reason = f"with other values of {nodes[0]} ids of no expert are selected"
            raise Refusal(reason, samples.trials.result, 6)
        if error > samples.tolerance:
            raise Refusal(
                f"with other values of {nodes[0]} alone the result is not the weighted sum of the "
                f"experts' rows: relative difference {error:.1e}",
                samples.trials.result,
                6,
            )


def _trials(samples: Samples) -> Iterator[tuple[Case, Sample]]:
    yield from samples.each()
    for case in samples.trials.turns:
        yield case, samples.of(samples.trials.run(case))


def _alike(samples: Samples) -> list[list[tuple[Node, ...]]]:
    """The groups of inputs to change alone. Parameters that every expert has one of are checked
    together, as there may be hundreds."""
    trials = samples.trials
    kinds: dict[Any, list[tuple[Node, ...]]] = defaultdict(list)
    for group in trials.perturbed:
        (node, *_), val = group, value(group[0])
        alike: Any = node
        if isinstance(val, Tensor) and trials.around.what(node) == "parameter":
            alike = (val.dtype, str(shape(node)))
        kinds[alike].append(group)
    found: list[list[tuple[Node, ...]]] = []
    for groups in kinds.values():
        if len(groups) >= max(2, trials.selection.num_experts):
            found.append(groups)
        else:
            found += [[group] for group in groups]
    return found
