"""What `tests.support` measures: one case on one rank, compiled and compared with eager."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import moe_fx
from tests import families, language_models
from tests.families import BLOCKS, DECORATED
from tests.language_models import MODELS, result

__all__ = ["Case", "Outcome", "block_cases", "build_case", "model_cases", "outcomes"]

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
"""Relative to the largest value. In bfloat16 a whole model's tokens may take other experts: there
`HALF` of them must be within it."""
HALF = 0.5
_LENGTHS = (9, 12)
"""Tokens in a sequence; the next rank has one more. More than the sliding window of a model."""


@dataclass(frozen=True)
class Case:
    """kind: "block" or "model". impl: "-" if the family does not let one choose. dynamic: compiled
    once with ``dynamic=True`` for two numbers of tokens."""

    kind: str
    label: str
    impl: str
    dtype: str
    dynamic: bool = False


@dataclass(frozen=True)
class Outcome:
    """captured: "yes" (one graph), "fullgraph" (one graph with ``fullgraph=True`` only) or "no".
    layers: MoE layers that the forward went through. equal: the results on all ranks are those of
    eager; None if there was nothing to compare. why: what was declined, and reasons for "no"."""

    captured: str
    layers: int
    regions: int
    verified: int
    equal: bool | None
    experts: str = ""
    router: str = ""
    why: str = ""


def block_cases() -> list[Case]:
    cases = _cases("block", tuple(BLOCKS))
    return cases + [Case(c.kind, c.label, c.impl, c.dtype, True) for c in cases if _decorated32(c)]


def model_cases() -> list[Case]:
    cases = _cases("model", MODELS)
    dynamic = [c for c in cases if _decorated32(c) and c.impl == "grouped_mm"]
    return cases + [Case(c.kind, c.label, c.impl, c.dtype, True) for c in dynamic]


def _cases(kind: str, labels: tuple[str, ...]) -> list[Case]:
    return [
        Case(kind, label, impl, dtype)
        for label in labels
        for impl in (("grouped_mm", "batched_mm") if label in DECORATED else ("-",))
        for dtype in TOLERANCE
    ]


def _decorated32(case: Case) -> bool:
    return case.label in DECORATED and case.dtype == "float32"


def outcomes(rank: int, batch: list[Case]) -> list[Outcome]:
    """On a rank: each case."""
    transformers.logging.set_verbosity_error()
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    with torch.no_grad():
        return [_outcome(rank, case) for case in batch]


def _outcome(rank: int, case: Case) -> Outcome:
    module, steps, layers = build_case(rank, case)
    try:
        return _measured(module, steps, layers, case)
    except TorchDynamoException as error:
        said = str(error).strip().splitlines()
        return Outcome("no", layers, 0, 0, None, why=f"compiling it raises: {' '.join(said[:2])}")


def _measured(
    module: nn.Module, steps: list[Mapping[str, Any]], layers: int, case: Case
) -> Outcome:
    group = dist.group.WORLD if case.label in DECORATED else None
    run = _compile(module, steps, case, group)
    captured = "yes"
    if run.graphs > 1:
        captured = "no"
        if group is None and (whole := _whole(module, steps, case)) is not None:
            run, captured = whole, "fullgraph"
    if group is None and run.graphs == 1 and run.regions:
        run = _compile(module, steps, case, dist.group.WORLD, captured == "fullgraph")
    return Outcome(
        captured=captured,
        layers=layers,
        regions=len(run.regions),
        verified=sum(region.verified for region in run.regions),
        equal=_equal(module, steps, run.results, case) if run.regions else None,
        experts=", ".join(dict.fromkeys(f"{r.top_k} of {r.num_experts}" for r in run.regions)),
        router=", ".join(dict.fromkeys(r.router.score for r in run.regions)),
        why=_why(run),
    )


@dataclass(frozen=True)
class _Run:
    reports: list[moe_fx.Report]
    results: list[Tensor]

    @property
    def graphs(self) -> int:
        return len(self.reports)

    @property
    def regions(self) -> list[moe_fx.Region]:
        return [region for report in self.reports for region in report.regions]


def _compile(
    module: nn.Module,
    steps: list[Mapping[str, Any]],
    case: Case,
    group: dist.ProcessGroup | None,
    fullgraph: bool = False,
) -> _Run:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    options = {"ep_group": group, "base": "eager", "on_report": reports.append}
    compiled = torch.compile(
        module, backend="moe_fx", dynamic=case.dynamic, fullgraph=fullgraph, options=options
    )
    return _Run(reports, [result(compiled(**step)) for step in steps])


def _whole(module: nn.Module, steps: list[Mapping[str, Any]], case: Case) -> _Run | None:
    try:
        return _compile(module, steps, case, None, fullgraph=True)
    except TorchDynamoException:
        return None


def build_case(rank: int, case: Case) -> tuple[nn.Module, list[Mapping[str, Any]], int]:
    """(module, arguments of each step, MoE layers)."""
    dtype = getattr(torch, case.dtype)
    impl = "grouped_mm" if case.impl == "-" else case.impl
    lengths = _LENGTHS if case.dynamic else _LENGTHS[:1]
    if case.kind == "block":
        block, _ = families.build(case.label, impl, dtype)
        steps = [
            _named(block, families.inputs(case.label, dtype, seed=1 + rank, length=length))
            for length in lengths
        ]
        return block, steps, 0 if case.label == "bamba" else 1
    model = language_models.build(case.label, impl, dtype)
    steps = [
        language_models.inputs(case.label, length + rank, dtype, seed=rank) for length in lengths
    ]
    return model, steps, language_models.moe_layers(case.label, model, steps[0])


def _named(block: nn.Module, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = list(inspect.signature(block.forward).parameters)
    return dict(zip(names, values, strict=False))


def _equal(
    module: nn.Module, steps: list[Mapping[str, Any]], results: list[Tensor], case: Case
) -> bool:
    for step, found in zip(steps, results, strict=True):
        expected = result(module(**step)).double()
        error = (found.double() - expected).abs() / expected.abs().max()
        near = error.flatten(0, -2).amax(-1) <= TOLERANCE[case.dtype]
        loose = case.kind == "model" and case.dtype == "bfloat16"
        if near.double().mean() < (HALF if loose else 1.0):
            return False
    return True


def _why(run: _Run) -> str:
    reasons = [entry.reason for report in run.reports for entry in report.declined]
    if run.graphs > 1:
        reasons.insert(0, f"{run.graphs} graphs")
    return re.sub(r"\S*/site-packages/", "", "; ".join(dict.fromkeys(reasons)))
