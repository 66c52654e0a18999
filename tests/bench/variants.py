"""The programs that are measured side by side, each from the same block of transformers.

A variant is built on every rank; it gets its block sharded its own way and returns what to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe_fx
from moe_fx.bench.ranks.programs import CannotRun, hugging_face
from tests.bench import functional

CHUNKS = (1, 2, 4, 8)
COMPUTE, UNOVERLAPPED, AUTO = "compute", "off", "auto"
AUTO_EVEN = "auto_even"
"""``auto`` with the promise that all ranks have the same number of tokens."""
HF_EAGER, HF_COMPILED = "hf_eager", "hf_compiled"
INDUCTOR, INDUCTOR_COST = "inductor", "inductor_cost"
TITLES: dict[str, str] = {
    COMPUTE: "compute only",
    UNOVERLAPPED: "ours, unoverlapped",
    HF_EAGER: "HF AllToAllEP, eager",
    HF_COMPILED: "HF AllToAllEP, compiled",
    INDUCTOR: "Inductor's scheduler",
    INDUCTOR_COST: "Inductor's scheduler, our costs",
    **{f"chunks{n}": f"ours, {n} chunk{'s' if n > 1 else ''}" for n in CHUNKS},
    AUTO: "ours, auto",
    **{f"allgather{n}": f"ours, allgather, {n} chunk{'s' if n > 1 else ''}" for n in CHUNKS},
    AUTO_EVEN: "ours, auto, even tokens",
}
FIXED = tuple(f"chunks{n}" for n in CHUNKS)
FIXED_EVEN = tuple(f"allgather{n}" for n in CHUNKS)
OURS = (*FIXED, AUTO, *FIXED_EVEN, AUTO_EVEN)
PEERS = (HF_EAGER, HF_COMPILED, INDUCTOR, INDUCTOR_COST)

_MEMORY_GBPS = 10.0


@dataclass
class Program:
    """``call`` runs the forward of ``module``. compiling: what holds while it is compiled.
    reports: of moe_fx, one a compiled graph; None for a program that is not ours."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    compiling: Callable[[], AbstractContextManager[Any]] = nullcontext
    reports: list[Any] | None = field(default=None)

    def require_rewritten(self) -> None:
        if self.reports is not None and not any(report.regions for report in self.reports):
            said = [str(d.reason) for report in self.reports for d in report.declined]
            raise CannotRun(f"moe_fx did not rewrite the layer: {'; '.join(said) or 'not found'}")


def make(name: str, block: Callable[[], nn.Module], sharded: Callable[[], nn.Module]) -> Program:
    """``block()``: a new whole block. ``sharded()``: one whose experts `moe_fx.shard_experts` has
    cut, the same for every caller. Raises `CannotRun`."""
    if name in (HF_EAGER, HF_COMPILED):
        module = hugging_face(block())
        return Program(module, torch.compile(module) if name == HF_COMPILED else module)
    if name in (INDUCTOR, INDUCTOR_COST):
        estimate = None
        if name == INDUCTOR_COST:
            estimate = moe_fx.inductor_runtime_estimation(dist.group.WORLD, "cpu")
        functional.register()
        program = _ours(sharded(), UNOVERLAPPED, functional.BACKEND)
        program.compiling = lambda: _overlap_scheduling(estimate)
        return program
    return _ours(sharded(), UNOVERLAPPED if name == COMPUTE else name, "inductor")


def options_of(name: str) -> dict[str, Any]:
    """The options of one of `OURS`, or of ``off``."""
    if name == UNOVERLAPPED:
        return {"strategy": "alltoall", "overlap": "off"}
    if name in (AUTO, AUTO_EVEN):
        return {"even_tokens": name == AUTO_EVEN}
    strategy = "allgather" if name in FIXED_EVEN else "alltoall"
    return {"strategy": strategy, "overlap": int(name[-1])}


def predictions(name: str, program: Program) -> dict[str, float]:
    """Seconds that the cost model expects, by variant: of an `AUTO` program and of what it chose
    from."""
    found: dict[str, float] = {}
    for report in program.reports or ():
        for plan in report.plans:
            if plan.predicted is not None:
                found[name] = plan.predicted.seconds
                for way in plan.predicted.weighed:
                    found[f"{_prefix(way.strategy)}{way.chunks}"] = way.seconds
    return found


def chosen(name: str, program: Program) -> str:
    """What an automatic program decided for, as the name of the fixed one; "" of others."""
    if name not in (AUTO, AUTO_EVEN):
        return ""
    (plan,) = [plan for report in program.reports or () for plan in report.plans]
    return f"{_prefix(plan.strategy)}{plan.chunks}"


def _prefix(strategy: str) -> str:
    return "chunks" if strategy == "alltoall" else strategy


def _ours(module: nn.Module, name: str, base: str) -> Program:
    reports: list[Any] = []
    options = {**options_of(name), "base": base, "on_report": reports.append}
    compiled = torch.compile(
        module, backend="moe_fx", fullgraph=True, dynamic=False, options=options
    )
    return Program(module, compiled, reports=reports)


@contextmanager
def _overlap_scheduling(estimate: Callable[[Any], float | None] | None) -> Iterator[None]:
    """Inductor's scheduler on. It would time matmuls on a GPU and ask Triton for the memory's
    bandwidth, and so fails without one: here it estimates matmuls, and is told this machine's
    bandwidth. Its other figures stay its own."""
    from torch._inductor import config

    prefix = "aten_distributed_optimizations."
    options: dict[str, Any] = {
        "enable_overlap_scheduling": True,
        "insert_overlap_deps": True,
        "compute_estimator": "analytical",
        "custom_runtime_estimation": estimate,
    }
    bandwidth = patch("torch.utils._runtime_estimation.get_gpu_dram_gbps", lambda: _MEMORY_GBPS)
    with bandwidth, config.patch({prefix + key: value for key, value in options.items()}):
        yield
