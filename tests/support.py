"""``python -m tests.support [--check]``: which transformers families moe_fx turns into
expert-parallel programs, as docs/support.md. ``--check`` writes nothing and exits 1 on drift.

Per family, implementation and dtype one MoE block is compiled on two ranks (gloo, base "eager",
replicated weights, other tokens on each rank) and compared with eager.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import transformers
import typer

import moe_fx
from moe_fx.region import Declined
from moe_fx.testing import RankPool
from tests.families import BLOCKS, DECORATED, build, inputs

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
DTYPES = (torch.float32, torch.bfloat16)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
_BATCH = 12

_HEAD = """# Families of transformers {version}

Written by `python -m tests.support`; `.ci/run` checks that it still holds.

One tiny MoE block of each family (`tests/families.py`), default settings of `torch.compile`.
*captured*: Dynamo makes one graph of the block. *recognised*, *verified*: what `moe_fx.explain`
says. *equal*: on two ranks (gloo, replicated weights, base "eager") the result is that of eager, to
1e-5 in float32 and 5e-2 in bfloat16 relative to the largest value. In bfloat16 two correct programs
may select other experts where the router nearly ties.

The implementation is `experts_implementation`; families without have one form of their own ("-").

"""
_COLUMNS = ("family", "experts", "router", "implementation", "dtype")
_RESULTS = ("captured", "recognised", "verified", "equal")


@dataclass(frozen=True)
class Case:
    label: str
    impl: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Outcome:
    """equal: the results on this rank are those of eager. why: of what is not."""

    graphs: int
    regions: int
    verified: int
    equal: bool
    experts: str
    router: str
    why: str


def cases() -> list[Case]:
    return [
        Case(label, impl if label in DECORATED else "-", dtype)
        for label in BLOCKS
        for impl in (("grouped_mm", "batched_mm") if label in DECORATED else ("-",))
        for dtype in DTYPES
    ]


def outcomes(rank: int, batch: list[Case]) -> list[Outcome]:
    """On a rank: each case, compiled and compared."""
    transformers.logging.set_verbosity_error()
    torch._logging.set_logs(dynamo=logging.ERROR)
    with torch.no_grad():
        return [_outcome(rank, case) for case in batch]


def _outcome(rank: int, case: Case) -> Outcome:
    torch._dynamo.reset()
    impl = "grouped_mm" if case.impl == "-" else case.impl
    module, _ = build(case.label, impl, case.dtype)
    values = inputs(case.label, case.dtype, seed=1 + rank)
    expected = _tensor(module(*values))
    reports: list[moe_fx.Report] = []
    options = {"ep_group": dist.group.WORLD, "base": "eager", "on_report": reports.append}
    compiled = torch.compile(module, backend="moe_fx", options=options)
    found = _tensor(compiled(*values))
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    regions = [region for report in reports for region in report.regions]
    declined = [entry for report in reports for entry in report.declined]
    return Outcome(
        graphs=len(reports),
        regions=len(regions),
        verified=sum(region.verified for region in regions),
        equal=bool(error <= _TOLERANCE[case.dtype]),
        experts=", ".join(f"{r.top_k} of {r.num_experts}" for r in regions),
        router=", ".join(r.router.score for r in regions),
        why=_why(len(reports), declined),
    )


def _tensor(result: object) -> torch.Tensor:
    while isinstance(result, tuple):
        result = result[0]
    assert isinstance(result, torch.Tensor)
    return result


def _why(graphs: int, declined: list[Declined]) -> str:
    reasons = [entry.reason for entry in declined]
    if graphs > 1:
        reasons.insert(0, f"{graphs} graphs")
    return "; ".join(dict.fromkeys(reasons))


def page(results: dict[Case, list[Outcome]]) -> str:
    """Markdown: one row per case, grouped by what became of it."""
    columns = (*_COLUMNS, *_RESULTS)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_row(case, ranks))} |" for case, ranks in results.items()]
    reasons: dict[str, str] = {}
    for case, (first, *_) in results.items():
        if first.regions != 1 or first.why:
            reasons[case.label] = first.why or "no selection of experts in the graph"
    text = _HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"
    if reasons:
        text += "\nWhy not:\n\n" + "".join(f"- {k}: {v}\n" for k, v in reasons.items())
    return text


def _row(case: Case, ranks: list[Outcome]) -> list[str]:
    def mark(holds: bool) -> str:
        return "yes" if holds else "no"

    first = ranks[0]
    return [
        case.label,
        first.experts or "-",
        first.router or "-",
        case.impl,
        str(case.dtype)[6:],
        mark(first.graphs == 1),
        mark(first.regions > 0),
        mark(first.verified > 0),
        mark(all(rank.equal for rank in ranks)) if first.regions else "-",
    ]


def measure() -> dict[Case, list[Outcome]]:
    todo, results = cases(), {}
    with RankPool(2) as pool:
        for start in range(0, len(todo), _BATCH):
            batch = todo[start : start + _BATCH]
            by_rank = pool.run(outcomes, batch, timeout=60.0 * len(batch))
            for case, *ranks in zip(batch, *by_rank, strict=True):
                results[case] = list(ranks)
    return results


def main(check: Annotated[bool, typer.Option(help="Exit 1 if the page is stale.")] = False) -> None:
    text = page(measure())
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE} is stale: run `python -m tests.support` and read the difference")


if __name__ == "__main__":
    typer.run(main)
