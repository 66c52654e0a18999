"""``python -m tests.support [--check] [--only blocks|models|quick] [--family NAME ...]``: which
transformers families moe_fx turns into expert-parallel programs, as docs/support.md.

What was measured is kept in docs/support.json, from which the page is written: a part can be
measured again by itself. ``--check`` writes nothing and exits 1 if what it measured (by default
"quick", which .ci/full can afford) differs from what is kept, if one of those cases is missing, or
if the page does not follow from it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import transformers
import typer

from moe_fx.testing import RankPool
from tests.models import FAMILIES
from tests.support_cases import Case, Outcome, block_cases, model_cases, outcomes
from tests.support_page import page

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
DATA = PAGE.with_suffix(".json")
_BATCH = 4


class Part(str, Enum):
    """quick: the blocks, and of the models one implementation in float32, but for the families that
    `tests/e2e/test_families.py` runs."""

    blocks = "blocks"
    models = "models"
    quick = "quick"


def selected(part: Part | None, families: list[str]) -> list[Case]:
    cases = {
        Part.blocks: block_cases,
        Part.models: model_cases,
        Part.quick: lambda: [*block_cases(), *filter(_is_quick, model_cases())],
        None: lambda: [*block_cases(), *model_cases()],
    }[part]()
    return [case for case in cases if not families or case.label in families]


def _is_quick(case: Case) -> bool:
    usual = case.impl == "grouped_mm" and case.dtype == "float32" and not case.dynamic
    return usual and case.label not in FAMILIES


def measure(cases: list[Case], keep: dict[Case, Outcome] | None = None) -> dict[Case, Outcome]:
    """``keep`` is brought up to date and written after every batch."""
    found: dict[Case, Outcome] = {}
    with RankPool(2) as pool:
        for start in range(0, len(cases), _BATCH):
            batch = cases[start : start + _BATCH]
            by_rank = pool.run(outcomes, batch, timeout=300.0 * len(batch))
            for case, first, *others in zip(batch, *by_rank, strict=True):
                equal = first.equal and all(other.equal for other in others)
                found[case] = replace(first, equal=equal)
            if keep is not None:
                _write(keep | found)
    return found


def _read() -> dict[Case, Outcome]:
    if not DATA.exists():
        return {}
    kept = json.loads(DATA.read_text())
    if kept["transformers"] != transformers.__version__:
        return {}
    return {Case(**entry["case"]): Outcome(**entry["outcome"]) for entry in kept["measured"]}


def _write(results: dict[Case, Outcome]) -> None:
    """In the order of the cases; what is no case any more goes."""
    ordered = {case: results[case] for case in selected(None, []) if case in results}
    lines = [
        json.dumps({"case": asdict(case), "outcome": asdict(outcome)})
        for case, outcome in ordered.items()
    ]
    head = f'{{"transformers": "{transformers.__version__}", "measured": [\n'
    DATA.write_text(head + ",\n".join(lines) + "\n]}\n")
    PAGE.write_text(page(ordered))


def check(cases: list[Case]) -> list[str]:
    """What does not hold."""
    kept = _read()
    wrong = [f"not measured: {case}" for case in selected(Part.quick, []) if case not in kept]
    if not PAGE.exists() or PAGE.read_text() != page(kept):
        wrong.append(f"{PAGE.name} does not follow from {DATA.name}")
    found = measure(cases)
    wrong += [
        f"{case}\n  was {kept[case]}\n  is  {outcome}"
        for case, outcome in found.items()
        if case in kept and outcome != kept[case]
    ]
    return wrong


def main(
    check_only: Annotated[bool, typer.Option("--check", help="Exit 1 on a difference.")] = False,
    only: Annotated[Part | None, typer.Option(help="Measure a part.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Measure these families.")] = None,
    missing: Annotated[bool, typer.Option(help="Measure what has not been.")] = False,
) -> None:
    if check_only:
        wrong = check(selected(only or Part.quick, family or []))
        sys.exit("\n".join([*wrong, "run `python -m tests.support`"]) if wrong else 0)
    kept = _read()
    cases = selected(only, family or [])
    measure([case for case in cases if not missing or case not in kept], kept)


if __name__ == "__main__":
    typer.run(main)
