"""A layer at numbers of tokens: checked against float64 on fresh tokens, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from moe_fx.bench.floor import Rates
from moe_fx.bench.layers import Layer, build_block
from moe_fx.bench.machine import Function, Machine
from moe_fx.bench.points import HF, MEASURING, OURS, Point
from moe_fx.bench.programs import Programs, attempt, compiled, note_plan
from moe_fx.bench.reference import InFloat64, draw, first, leaves_of, relative_error
from moe_fx.bench.selection import Selection
from moe_fx.report import Report

__all__ = ["LayerRuns"]

_CACHES = 4
"""Where the weights that are read are larger than so many caches, the cache keeps none of them."""


class LayerRuns:
    """Of one layer, at every number of tokens that is asked for."""

    def __init__(
        self,
        layer: Layer,
        selection: Selection,
        machine: Machine,
        rates: Rates,
        say: Callable[[str], None],
    ) -> None:
        self.layer, self.selection, self.machine = layer, selection, machine
        self.rates, self.say = rates, say
        self.block = build_block(layer, machine.device)
        self.exact = InFloat64(self.block, machine)
        self.kept: tuple[dict[str, Function], list[Report]] | None = None

    def points(self, tokens: Sequence[int]) -> Iterator[Point]:
        kind = "training" if self.selection.training else "forward"
        measure = self._training if self.selection.training else self._forward
        for number in tokens:
            point = Point(self.layer.name, kind, number)
            self.say(f"{point.title}: compiling")
            with attempt(point, MEASURING):
                measure(point)
                point.judge()
            self.machine.clear()
            yield point

    def _forward(self, point: Point) -> None:
        with torch.no_grad():
            given = self._prepare(point)
            functions, reports = self._compiled()
            programs = Programs(
                point, self.machine, {n: partial(_call, f, given) for n, f in functions.items()}
            )
            programs.capture()
            same, rows = draw(self.block, given)
            expected = self.exact.forward(given[:, rows])
            found = programs.results()
            for name, result in found.items():
                whole = bool(torch.isfinite(result).all())
                point.errors[name] = (
                    relative_error(result[:, rows], expected) if whole else float("inf")
                )
            if HF in found and OURS in found:
                point.apart = relative_error(found[OURS][:, same], found[HF][:, same])
            self._finish(point, programs, reports)

    def _training(self, point: Point) -> None:
        given = self._prepare(point)
        self.block.module.requires_grad_(True)
        try:
            self._training_of(point, given.requires_grad_(True))
        finally:
            self.block.module.requires_grad_(False)

    def _training_of(self, point: Point, given: Tensor) -> None:
        """Checked with an output's gradient that is zero but for a few tokens, so that the float64
        of these gives the gradients of all parameters."""
        leaves = leaves_of(self.block.module, given)
        output = torch.randn_like(given)
        functions, reports = self._compiled()
        steps = {
            name: partial(_step, function, given, list(leaves.values()), output)
            for name, function in functions.items()
        }
        programs = Programs(point, self.machine, dict(steps))
        _, rows = draw(self.block, given)
        every = output.clone()
        output.zero_()
        output[:, rows] = every[:, rows]
        expected = self.exact.gradients(given[:, rows], output[:, rows])
        for name, function in functions.items():
            if name in programs.calls:
                found = _gradients(function, given, list(leaves.values()), output)
                point.errors[name] = _worst(dict(zip(leaves, found, strict=True)), expected, rows)
        output.copy_(every)
        self._finish(point, programs, reports)

    def _prepare(self, point: Point) -> Tensor:
        """The tokens that programs are called with; point gets its floor."""
        work, device = self.block.work(), self.machine.device
        dtype = next(self.block.experts.parameters()).dtype
        given = torch.randn(1, point.tokens, self.block.hidden, device=device, dtype=dtype)
        ids = self.block.selected(given)
        point.hit = ids.unique().numel()
        point.floor_flops, point.floor_bytes = work.floor(
            *(point.tokens, ids.shape[1], point.hit, self.rates), point.kind == "training"
        )
        return given

    def _compiled(self) -> tuple[dict[str, Function], list[Report]]:
        if self.kept is None or not self.selection.dynamic:
            self.kept = compiled(self.block.module, self.selection.dynamic, self.selection.base)
        return self.kept

    def _finish(self, point: Point, programs: Programs, reports: list[Report]) -> None:
        note_plan(point, reports)
        self.say(f"{point.title}: timing")
        read = self.block.work().weight_bytes(point.hit)
        programs.time(self.selection.seconds_per_point, read < _CACHES * self.machine.cache_bytes)
        if self.selection.parts:
            programs.profile()


def _call(function: Function, given: Tensor) -> Tensor:
    return first(function(given))


def _gradients(
    function: Function, given: Tensor, leaves: list[Tensor], output: Tensor
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(first(function(given)), leaves, output, allow_unused=True)


def _step(function: Function, given: Tensor, leaves: list[Tensor], output: Tensor) -> Tensor:
    """Forward and backward; gradients are made anew and not added up."""
    found = _gradients(function, given, leaves, output)[0]
    assert found is not None
    return found


def _worst(found: dict[str, Tensor | None], expected: dict[str, Tensor], rows: Tensor) -> float:
    """The largest error of any gradient, of the tokens only in ``rows``. A gradient that is not
    there is as far off as can be."""
    errors = []
    for name, right in expected.items():
        gradient = found[name]
        if gradient is None:
            return float("inf")
        errors.append(relative_error(gradient[:, rows] if name == "tokens" else gradient, right))
    return max(errors)
