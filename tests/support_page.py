"""docs/support.md from what `tests.support` measured."""

from __future__ import annotations

from collections.abc import Iterable

import transformers

from tests.support_cases import Case, Outcome

_HEAD = """# Families of transformers {version}

Written by `python -m tests.support`; what was measured is in `support.json`. `.ci/full` measures
all blocks again. Of models, `--only quick` measures those with `grouped_mm` in float32 but for the
families in `tests/models.py`, which are in the end-to-end tests.

{summary}

*captured*: Dynamo makes one graph, with the default settings of `torch.compile`; "fullgraph": with
`fullgraph=True` only. *recognised*: MoE layers found, of those that the forward goes through.
*verified*: those whose replacement gave the same values before it was accepted. *equal*: on two
ranks (gloo, replicated weights, other tokens on each, base "eager") the result is that of eager, to
1e-5 in float32 and 5e-2 in bfloat16 relative to the largest value. *dynamic*: the same of one graph
compiled with `dynamic=True` and run with two numbers of tokens (measured in float32, of models with
`grouped_mm`; elsewhere "-").

In bfloat16 two correct programs may select other experts where the router nearly ties. In a model
that moves whole tokens, and attention spreads it: there *equal* asks it of half of the tokens.

The implementation is `experts_implementation`; families without have one form of their own ("-").
"""
_BLOCKS = """
## Blocks

One tiny MoE block of each family (`tests/families.py`).

"""
_MODELS = """
## Models

A model of two layers of each family (`tests/language_models.py`), of multimodal families the
language model. bamba has none with experts.

"""
_COLUMNS = ("family", "implementation", "dtype", "captured", "recognised", "verified", "equal")
_NONE = "no experts: its code provides for them and makes none"


def page(results: dict[Case, Outcome]) -> str:
    """Markdown: a table of blocks, one of models, and reasons."""
    blocks = {case: outcome for case, outcome in results.items() if case.kind == "block"}
    models = {case: outcome for case, outcome in results.items() if case.kind == "model"}
    summary = f"{_count(blocks, 'blocks')} {_count(models, 'models')}"
    text = _HEAD.format(version=transformers.__version__, summary=summary)
    text += _BLOCKS + _table(blocks, router=True) + _MODELS + _table(models, router=False)
    if reasons := _reasons(results):
        text += "\nWhy not:\n\n" + "".join(f"- {k}: {v}\n" for k, v in reasons.items())
    if attention := _attention(results):
        text += (
            f"\nModels that also select tokens in attention, which is left alone: {attention}.\n"
        )
    return text


def _count(results: dict[Case, Outcome], what: str) -> str:
    families = {case.label for case in results}
    partial = {case.label for case, outcome in results.items() if not _full(outcome)}
    return f"Of {len(families)} {what}, {len(families - partial)} are right in every row."


def _full(outcome: Outcome) -> bool:
    found = outcome.regions == outcome.verified == outcome.layers
    return found and outcome.captured != "no" and bool(outcome.equal)


def _table(results: dict[Case, Outcome], router: bool) -> str:
    columns = [*_COLUMNS, "dynamic"]
    if router:
        columns[1:1] = ["experts", "router"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for case, outcome in results.items():
        if not case.dynamic:
            dynamic = results.get(Case(case.kind, case.label, case.impl, case.dtype, True))
            lines.append(f"| {' | '.join(_row(case, outcome, dynamic, router))} |")
    return "\n".join(lines) + "\n"


def _row(case: Case, outcome: Outcome, dynamic: Outcome | None, router: bool) -> Iterable[str]:
    yield case.label
    if router:
        yield outcome.experts or "-"
        yield outcome.router or "-"
    yield case.impl
    yield case.dtype
    yield outcome.captured
    yield f"{outcome.regions} of {outcome.layers}"
    yield f"{outcome.verified} of {outcome.layers}"
    yield "-" if outcome.equal is None else _mark(outcome.equal)
    yield "-" if dynamic is None else _mark(_full(dynamic))


def _mark(holds: bool) -> str:
    return "yes" if holds else "no"


def _reasons(results: dict[Case, Outcome]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for case, outcome in results.items():
        if not _full(outcome):
            what = _NONE if not outcome.layers else outcome.why
            shapes = ", dynamic" if case.dynamic else ""
            name = f"{case.label} ({case.kind}{shapes})"
            reasons.setdefault(name, what or "no selection of experts in the graph")
    return reasons


def _attention(results: dict[Case, Outcome]) -> str:
    return ", ".join(
        dict.fromkeys(
            c.label for c, o in results.items() if _full(o) and o.why and c.kind == "model"
        )
    )
