"""One node of a real block's graph is changed: the rewrite must compute what the changed one does,
on one device and on two ranks, with and without verification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

import pytest

from tests.mutations.changes import Mutation
from tests.mutations.every_node import mutations
from tests.mutations.outcomes import outcome, wrong
from tests.passes.graphs import Captured, block, captured, tokens

CASES = (
    ("qwen3_moe", "grouped_mm"),
    ("qwen3_moe", "batched_mm"),
    ("deepseek_v3", "grouped_mm"),
    ("gpt_oss", "grouped_mm"),
)

LIMIT = 60  # changes to each graph; all of them, over a thousand, take a minute and a half


@cache
def case_of(family: str, form: str) -> Captured:
    return captured(block(family, form), tokens(1, 12, 64))


def table(case: Captured, chosen: Iterable[Mutation], verify: str) -> dict[Mutation, str]:
    outcomes = {mutation: outcome(case, mutation, verify) for mutation in chosen}
    for mutation, found in outcomes.items():
        print(f"{found:10} {mutation}")
    print(dict(Counter(outcomes.values())))
    return outcomes


@pytest.mark.parametrize(("family", "form"), CASES)
def test_structure_alone_accepts_no_changed_graph_as_another_program(
    family: str, form: str
) -> None:
    case = case_of(family, form)
    every = list(mutations(case.module))
    chosen = [m for m in every if "reads" not in m.label]
    chosen += [m for m in every if "reads" in m.label][::4]
    chosen = chosen[:: max(1, len(chosen) // LIMIT)]
    outcomes = table(case, chosen, verify="off")
    assert wrong(outcomes) == {}
    counts = Counter(outcomes.values())
    assert counts["equal"] + counts["declined"] >= 45
    assert counts["declined"] >= 10


@pytest.mark.parametrize(("family", "form"), [("gpt_oss", "grouped_mm")])
def test_verification_accepts_no_changed_graph_as_another_program(family: str, form: str) -> None:
    case = case_of(family, form)
    chosen = [m for m in mutations(case.module) if "reads" not in m.label][::4]
    outcomes = table(case, chosen, verify="compile")
    assert wrong(outcomes) == {}
    assert Counter(outcomes.values())["equal"] >= 15


EXPECTED = {
    "topk: lowest": "declined",
    "topk: over tokens": "invalid",
    "topk: one more": "invalid",  # the sizes of views say two
    "getitem_1: one more": "equal",  # ids + 1: other ids dispatch
    "getitem: order reversed": "equal",  # weights of other tokens
    "softmax: over tokens": "equal",
    "sort: descending": "declined",
    "sort: of negated ids": "declined",
    "sort: of ids modulo 4": "declined",
    "floor_divide: by one more": "declined",
    "floor_divide: remainder": "declined",
    "histc: wider bins": "declined",
    "histc: bins from one": "declined",
    "histc: bins to E": "equal",
    "cumsum: counts": "declined",
    "cumsum: summed twice": "declined",
    "cumsum: exclusive": "declined",
    "cumsum: order reversed": "declined",
    "split: over rows": "invalid",
    "getitem_4: the other item": "equal",
    "getitem_5: the other item": "equal",
    "mul: running sum over rows": "declined",
    "mul: order reversed": "declined",
    "mul: softmax over features": "equal",
    "mul_1: left out": "equal",
    "mul_1: twice": "equal",
    "mul_1: add": "equal",
    "transpose: order reversed": "equal",  # experts with each other's weights
    "transpose: left out": "equal",
    "index_1: order reversed": "declined",
    "arange: backwards": "declined",
    "index_put: inverse of the inverse": "declined",
    "index_2: reads getitem_3 for index_put": "declined",
    "sum_2: largest": "declined",
    "sum_2: other dim": "invalid",
}


def test_what_becomes_of_single_changes_to_a_qwen3_block() -> None:
    case = case_of("qwen3_moe", "grouped_mm")
    chosen = {str(m): m for m in mutations(case.module) if str(m) in EXPECTED}
    found = {name: outcome(case, mutation, "off") for name, mutation in chosen.items()}
    assert found == EXPECTED
