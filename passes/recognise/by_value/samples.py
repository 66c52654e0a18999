"""The trials of a reading: the body's rows on each trial's pairs, and the result they should give.

Contract. A `Weighing` says which of a router's values weigh the experts' rows. ``Samples`` runs
each trial when a weighing first gets so far; ``Sample.found(weighing)`` is what that reading says
the result is, ``Sample.error`` how far that is from the captured result, ``Sample.change`` how far
the captured result moved after an input was changed. A trial whose result is not finite, or
the same everywhere, shows nothing and counts for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.compare import tells
from moe_fx.passes.evaluate.on_host import call_on_host, exactly
from moe_fx.passes.recognise.by_value.rows.layout import Body
from moe_fx.passes.recognise.by_value.trials import Case, Trials, Values

Shape = Literal["pairs", "experts", "experts first", "places", "ones"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_EXACT = 1e-6
_SECONDS = 30.0
_AT_LEAST = 4
_MUST_TELL = 2
_LEAST = 1e-200
_ROUNDING = 1e-2  # of a base that the experts' rows are small beside


@dataclass(frozen=True)
class Ids:
    """Nodes whose entries, side by side, are the ids ``[T, K]``."""

    nodes: tuple[Node, ...]

    def matrix(self, values: Values, top_k: int) -> Tensor:
        each = top_k // len(self.nodes)
        return torch.cat([values[node].reshape(-1, each) for node in self.nodes], 1)


@dataclass(frozen=True)
class Weighing:
    """node: the routing values, or None for ones. shape: an entry for each pair; for each token and
    expert ``[T, E]`` or ``[E, T]``; for each token, expert and place ``[T, E, C]``. mask: which
    pairs count (None: all); an expert that comes up twice for a token counts once, unless there is
    an entry for each pair. before: the tokens are multiplied, not the experts' rows. guarded: ids
    may be of no expert, and count for nothing then."""

    node: Node | None
    shape: Shape
    mask: Node | None = None
    before: bool = False
    guarded: bool = False

    def matrix(self, values: Values, ids: Tensor) -> Tensor | None:
        """``[T, K]`` weights."""
        if self.node is None:
            return None
        weights = values[self.node]
        num_tokens, top_k = ids.shape
        if self.shape == "pairs":
            weights = weights.reshape(num_tokens, top_k)
        else:
            if self.shape == "experts first":
                weights = weights.reshape(weights.shape[0], num_tokens).t()
            elif self.shape == "places":
                weights = weights.sum(-1)
            weights = weights.reshape(num_tokens, -1).gather(1, ids.long())
            if top_k > 1:
                weights = weights.where(_first_times(ids), 0.0)
        if self.mask is not None:
            weights = weights * values[self.mask].reshape(num_tokens, top_k)
        return weights


def _first_times(ids: Tensor) -> Tensor:
    """``[T, K]``: whether no expert before it is the same."""
    return ~(ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(2)


def _of_rows(tensor: Tensor) -> Tensor:
    """The largest entry of each row."""
    return tensor.double().abs().amax(-1)


def _tolerance(trials: Trials) -> float:
    if trials.exact:
        return _EXACT
    dtypes = {
        value(n).dtype
        for n in [*trials.inputs, *trials.nodes]
        if isinstance(value(n), Tensor) and value(n).dtype in TOLERANCE
    }
    return max((TOLERANCE[dtype] for dtype in dtypes), default=1e-4)


class Samples:
    """The trials, each run when a weighing first gets so far."""

    def __init__(self, trials: Trials, ids: Ids, body: Body, base: Node | None) -> None:
        self.trials, self.ids, self.body, self.base = trials, ids, body, base
        self.tolerance = _tolerance(trials)
        self.started = time.perf_counter()
        self.beyond = False  # whether ids of no expert were seen, and left out
        self._made: list[Sample] = []

    def each(self) -> Iterator[tuple[Case, Sample]]:
        for at, case in enumerate(self.trials.cases):
            if at == len(self._made):
                spent = time.perf_counter() - self.started
                if spent > _SECONDS and at >= _AT_LEAST:
                    return
                self._made.append(self.of(self.trials.run(case)))
            yield case, self._made[at]

    def of(self, values: Values) -> Sample:
        return Sample(self.trials, self.ids, self.body, self.base, values)

    def miss(self, weighing: Weighing) -> tuple[float, str] | None:
        """By how much, and in which trial, ``weighing`` first misses the result."""
        told = 0
        for case, sample in self.each():
            error = sample.error(weighing)
            if error > self.tolerance:
                return error, case.name
            told += sample.tells
            self.beyond |= sample.valid is not None
        if told < _MUST_TELL:
            raise Refusal(
                f"unproved: in {told} of the trials only was the result finite and not the same "
                "everywhere",
                self.trials.result,
                6,
            )
        return None

    def selects_beyond(self, name: str) -> bool:
        """Whether ids of no expert were met in the trial of this name."""
        return any(case.name == name and sample.valid is not None for case, sample in self.each())

    def got_further(self, miss: tuple[float, str], other: tuple[float, str]) -> bool:
        names = [case.name for case in self.trials.cases]
        here, there = names.index(miss[1]), names.index(other[1])
        return here > there or (here == there and miss[0] < other[0])


class Sample:
    """One trial, and the body's rows on its pairs."""

    def __init__(
        self, trials: Trials, ids: Ids, body: Body, base: Node | None, values: Values
    ) -> None:
        self.trials, self.body, self.values = trials, body, values
        self.ids = ids.matrix(values, trials.selection.top_k)
        if not self.ids.numel():
            raise Refusal("unproved: the graph is for no tokens at all", trials.result, 6)
        experts = trials.selection.num_experts
        valid = (self.ids >= 0) & (self.ids < experts)
        self.valid: Tensor | None = None if bool(valid.all()) else valid
        if self.valid is not None:
            self.ids = self.ids.where(valid, 0)
        flat = self.ids.reshape(-1)
        self.sorted, self.order = torch.sort(flat, stable=True)
        self.offsets = torch.bincount(flat.long(), minlength=experts).cumsum(0)
        tokens = values[trials.tokens[0]]
        self.tokens = tokens.reshape(-1, tokens.shape[-1])
        result = values[trials.result]
        self.expected = (result if base is None else result - values[base]).flatten(0, -2)
        self.result = result.detach()
        largest = [_of_rows(x.detach()) for x in (self.expected, result.flatten(0, -2))]
        if not trials.exact:  # rounding of large rows may be all that there is of small ones
            largest = [rows.max().expand_as(rows) for rows in largest]
        self.scale = torch.maximum(largest[0], _ROUNDING * largest[1]).clamp_min(_LEAST)
        self.finite = all(bool(rows.isfinite().all()) for rows in largest)
        self.tells = self.finite and tells(self.expected.detach())
        self._plain: Tensor | None = None

    def found(self, weighing: Weighing) -> Tensor:
        """``[T, H]``: what the reading says the result is."""
        weights = weighing.matrix(self.values, self.ids)
        if self.valid is not None:
            weights = self.valid * (1.0 if weights is None else weights)
        if weights is not None and weighing.before:
            rows = self._rows(weights)
            weights = None
        else:
            if self._plain is None:
                self._plain = self._rows(None)
            rows = self._plain
        pairs = torch.empty_like(rows).index_copy(0, self.order, rows)
        pairs = pairs.view(*self.ids.shape, -1)
        if weights is not None:
            pairs = pairs * weights.unsqueeze(-1)
        return pairs.sum(1)

    def _rows(self, before: Tensor | None) -> Tensor:
        top_k = self.ids.shape[1]
        rows = self.tokens[self.order // top_k]
        if before is not None:
            rows = (rows * before.reshape(-1, 1)[self.order]).to(rows.dtype)
        body = self.body
        values: Values = {body.rows: rows, body.ids: self.sorted, body.offsets: self.offsets}
        for placeholder, of in body.operands.items():
            values[placeholder] = (
                self.values[of]
                if isinstance(of, Node)
                else torch.stack([self.values[n] for n in of])
            )
        exact = self.trials.exact
        with exactly(exact):
            for node in body.graph.nodes:
                if node.op == "call_function":
                    values[node] = call_on_host(node, values, exact)
        return values[body.graph.output_node().args[0]]  # type: ignore[index]

    def change(self, after: Values) -> float:
        """Of the result, relative to its largest entry; 0 if it is not finite before or after."""
        other = after[self.trials.result].detach()
        if not self.finite or not bool(other.isfinite().all()):
            return 0.0
        moved = (self.result.double() - other.double()).abs().max()
        return float(moved / self.result.double().abs().max().clamp_min(1e-30))

    def error(self, weighing: Weighing) -> float:
        """0 where the captured result shows nothing."""
        if not self.finite:
            return 0.0
        try:
            found = self.found(weighing)
        except (RuntimeError, IndexError) as failure:
            reason = f"the experts' body could not be run by rows: {failure}"
            raise Refusal(reason, self.trials.result, 4) from None
        if found.shape != self.expected.shape:
            return float("inf")
        difference = _of_rows(found.detach() - self.expected.detach()) / self.scale
        error = float(difference.max())
        return error if error == error else float("inf")
