"""``python -m tests.autocast_grid [--only block|model] [--family NAME] [--impl NAME]``: each case
of the support table under bfloat16 autocast, compared with ``aot_eager`` under the same autocast;
``--inside``, ``--device cuda``, ``--jobs N`` (processes side by side).

Prints a line per case: MoE layers found, of those found without autocast; how far results and
gradients are from ``aot_eager``'s, relative to the largest value, "same" being to the bit; and what
was declined. Exits 1 if a layer is missed without a reason, or a difference is beyond bfloat16's.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import sys
import traceback
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import moe_fx
from tests.language_models import result
from tests.support_cases import Case, block_cases, build_case, model_cases

__all__ = ["Outcome", "outcome"]

TOLERANCE = 5e-2
_KEPT = Path(__file__).parents[1] / "docs" / "support.json"


@dataclass(frozen=True)
class Outcome:
    """regions: MoE layers found; without: those found in float32 without autocast. error,
    gradient_error: 0.0 is to the bit. why: what was declined, or what went wrong."""

    regions: int
    without: int
    error: float
    gradient_error: float
    why: str

    @property
    def good(self) -> bool:
        found = self.regions >= self.without or bool(self.why)
        return found and max(self.error, self.gradient_error) <= TOLERANCE

    def __str__(self) -> str:
        far = [f"{e:.1e}" if e else "same" for e in (self.error, self.gradient_error)]
        said = f"{self.regions}/{self.without} results {far[0]:>8} gradients {far[1]:>8}"
        return f"{'good' if self.good else 'BAD '} {said} {self.why}"


def outcome(
    case: Case, training: bool, inside: bool = False, base: str = "aot_eager", device: str = "cpu"
) -> Outcome:
    """inside: autocast is entered within what is compiled, as accelerate does it."""
    module, (step, *_), _ = build_case(0, case)
    module = module.to(device)
    step = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in step.items()}
    without, whole = _without(case)
    try:
        wanted = _run(module, step, training, inside, whole, "aot_eager", {})
    except (TorchDynamoException, RuntimeError) as error:  # not all can be autocast
        return Outcome(0, 0, 0.0, 0.0, f"aot_eager raises: {str(error).strip().splitlines()[0]}")
    reports: list[moe_fx.Report] = []
    options = {"base": base, "on_report": reports.append}
    found = _run(module, step, training, inside, whole, "moe_fx", options)
    reasons = [declined.reason for report in reports for declined in report.declined]
    return Outcome(
        regions=sum(len(report.regions) for report in reports),
        without=without,
        error=_difference(found[:1], wanted[:1]),
        gradient_error=_difference(found[1:], wanted[1:]),
        why="; ".join(dict.fromkeys(reasons)),
    )


class _Inside(nn.Module):
    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self.module, self.device = module, device

    def forward(self, **values: Any) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            return self.module(**values)


def _run(
    module: nn.Module,
    step: Mapping[str, Any],
    training: bool,
    inside: bool,
    whole: bool,
    backend: str,
    options: dict[str, Any],
) -> list[Tensor | None]:
    """The result, and the gradients of all parameters."""
    torch._dynamo.reset()
    device = next(module.parameters()).device.type
    module.requires_grad_(training)
    module.zero_grad(set_to_none=True)
    compiled = torch.compile(
        _Inside(module, device) if inside else module,
        backend=backend,
        fullgraph=whole,
        options=options or None,
    )
    around: Any = nullcontext() if inside else torch.autocast(device, torch.bfloat16)
    torch.manual_seed(0)
    with around, torch.set_grad_enabled(training):
        found = result(compiled(**step))
    if training:
        weights = torch.linspace(-1, 1, found.numel(), device=found.device).view_as(found)
        (found.float() * weights).sum().backward()
    return [found.detach(), *(parameter.grad for parameter in module.parameters())]


def _difference(found: list[Tensor | None], wanted: list[Tensor | None]) -> float:
    """The largest; infinite where dtypes differ, or only one is there. Some gradients are 0 but for
    rounding (of a key's bias): those are measured against the largest of all."""
    worst = 0.0
    least = 1e-3 * max(
        (float(t.abs().nan_to_num().max()) for t in wanted if t is not None), default=0
    )
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None or theirs is None:
            worst = max(worst, 0.0 if ours is theirs else float("inf"))
        elif ours.dtype != theirs.dtype:
            worst = float("inf")
        elif not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
            scale = theirs.double().abs().max().clamp_min(max(least, 1e-30))
            worst = max(worst, float((ours.double() - theirs.double()).abs().max() / scale))
    return worst


def _without(case: Case) -> tuple[int, bool]:
    """(MoE layers found without autocast, whether they are with ``fullgraph=True`` only)."""
    for entry in json.loads(_KEPT.read_text())["measured"]:
        if Case(**entry["case"]) == case:
            kept = entry["outcome"]
            return int(kept["regions"]), kept["captured"] == "fullgraph"
    return 0, False


def cases(only: str | None, families: list[str]) -> list[Case]:
    everything = {"block": block_cases, "model": model_cases}
    return [
        case
        for kind, those in everything.items()
        for case in those()
        if case.dtype == "float32"
        and not case.dynamic
        and only in (None, kind)
        and (not families or case.label in families)
    ]


def _line(work: tuple[Case, bool], inside: bool, device: str) -> tuple[bool, str]:
    """(good, what to print)."""
    case, training = work
    transformers.logging.set_verbosity_error()
    torch._logging.set_logs(dynamo=logging.CRITICAL)
    torch.set_num_threads(1)
    name = f"{case.kind} {case.label} {case.impl} {'training' if training else 'inference'}"
    try:
        found = outcome(case, training, inside, device=device)
    except Exception:  # the other cases are wanted too
        return False, f"{name:58} BAD  {traceback.format_exc()}"
    return found.good, f"{name:58} {found}"


def main(
    only: Annotated[str | None, typer.Option(help="block or model.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="These families.")] = None,
    impl: Annotated[str | None, typer.Option(help="grouped_mm or batched_mm.")] = None,
    inside: Annotated[bool, typer.Option(help="Autocast within what is compiled.")] = False,
    training: Annotated[bool | None, typer.Option(help="Leave out for both.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
) -> None:
    works = [
        (case, trains)
        for case in cases(only, family or [])
        if impl is None or case.impl in (impl, "-")
        for trains in ((False, True) if training is None else (training,))
    ]
    bad = 0
    line = functools.partial(_line, inside=inside, device=device)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for good, text in pool.map(line, works):
            print(text, flush=True)
            bad += not good
    print(f"{len(works)} cases, {bad} bad", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)
