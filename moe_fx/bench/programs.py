"""The programs of a point: what runs is compiled, captured, called on the same static inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_fx.bench.machine import Call, Function, Machine, interleaved
from moe_fx.bench.points import AGAINST, HF, OURS, Part, Point
from moe_fx.report import Report

_GRAPHS = {name.removesuffix("_graph"): name for pair in AGAINST.items() for name in pair}
"""``hf`` -> ``hf_graph``, ``ours`` -> ``ours_graph``."""
_PROFILED = 5
_MOST_PARTS = 12


@contextmanager
def attempt(point: Point, name: str) -> Iterator[None]:
    """What fails is left out of the table, and the reason is in it."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines()
        point.failed[name] = type(error).__name__ + (f": {said[0]}" if said else "")
        point.samples.pop(name, None)


def compiled(
    function: Any, dynamic: bool, base: str = "inductor"
) -> tuple[dict[str, Function], list[Report]]:
    """``function`` under torch.compile, as it is (HF) and with moe_fx (OURS); nothing is compiled
    before the first call. A layer that moe_fx does not rewrite is an error. The reports of moe_fx
    are there after that."""
    torch._dynamo.reset()
    reports: list[Report] = []
    options: dict[str, Any] = {
        "strict": True,
        "progress": False,
        "base": base,
        "on_report": reports.append,
    }
    return {
        HF: torch.compile(function, dynamic=dynamic, backend=base),
        OURS: torch.compile(function, dynamic=dynamic, backend="moe_fx", options=options),
    }, reports


class Programs:
    """Of one point: calls without arguments, and what each last returned.

    ``calls`` holds what compiled and, where it was asked for, what was captured.
    """

    def __init__(
        self, point: Point, machine: Machine, calls: dict[str, Callable[[], torch.Tensor]]
    ) -> None:
        self.point, self.machine = point, machine
        self.calls: dict[str, Callable[[], torch.Tensor]] = {}
        for name, call in calls.items():
            with attempt(point, name):
                begin = time.perf_counter()
                call()
                machine.samples(call, 1)
                point.compile_seconds[name] = time.perf_counter() - begin
                self.calls[name] = call

    def capture(self) -> None:
        """Each once more, as a graph."""
        for name, call in list(self.calls.items()):
            graph = _GRAPHS[name]
            with attempt(self.point, graph):
                replay, result = self.machine.captured(call)
                self.calls[graph] = _replayed(replay, result)

    def results(self, before: Callable[[], None] = lambda: None) -> dict[str, torch.Tensor]:
        """A copy of what each returns now, after ``before``."""
        found = {}
        for name, call in list(self.calls.items()):
            with attempt(self.point, name):
                before()
                found[name] = call().clone()
        return found

    def time(self, seconds: float, cold: bool) -> None:
        """What went wrong before is timed too: its time may say why."""
        self.point.samples |= interleaved(dict(self.calls), self.machine, seconds, cold)

    def profile(self) -> None:
        """The kernels of ours, by the time that they take."""
        if OURS in self.calls:
            self.point.parts = parts_of(self.calls[OURS], self.machine)


def note_plan(point: Point, reports: list[Report]) -> None:
    """What moe_fx did; that it did nothing is a failure, as what was timed is not it."""
    if OURS in point.failed:
        return
    bugs = [bug.reason for report in reports for bug in report.bugs]
    if bugs:
        point.failed[OURS] = f"moe_fx failed, and the layer ran as without it: {bugs[0]}"
    elif not any(report.regions for report in reports):
        point.failed[OURS] = "no layer was rewritten"
    point.plan = "; ".join(
        dict.fromkeys(plan.summary for report in reports for plan in report.plans)
    )


def _replayed(replay: Call, result: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        replay()
        return result

    # Outputs of a program that stops writing them are seen: they start as no numbers.
    result.fill_(float("nan"))
    return call


def parts_of(call: Call, machine: Machine) -> list[Part]:
    """By torch.profiler: kernels on a GPU, ops on the host."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = machine.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    machine.samples(call, 1)
    with profile(activities=kinds) as profiler:
        machine.samples(call, _PROFILED)
    found = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if took > 0:
            seconds = took / 1e6 / _PROFILED
            found.append(Part(event.key, seconds, event.count / _PROFILED))
    return sorted(found, key=lambda part: -part.seconds)[:_MOST_PARTS]
