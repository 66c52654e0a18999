"""``python -m tests.mutations``: has every kind of mistake, and fails where a rewrite errs."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.mutations.__main__ import CASES, main, measure
from tests.mutations.kinds import KINDS, layer_of, mistakes
from tests.passes.graphs import block, captured, tokens
from tests.passes.verify.test_verify import plant, weights_dropped

runner = CliRunner()


def run(*args: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return runner.invoke(app, list(args), env={"COLUMNS": "150"})


def test_there_is_a_mistake_of_every_kind_and_none_is_rewritten_wrongly() -> None:
    case = CASES["qwen3_moe grouped_mm"]()
    every = list(mistakes(case.module))
    assert {m.kind for m in every} == {kind.__name__.replace("_", " ") for kind in KINDS}
    assert len({str(m) for m in every}) == len(every)


def test_the_table_of_a_block() -> None:
    result = run("qwen3_moe batched_mm", "--others", "0")
    assert result.exit_code == 0
    (total,) = [line for line in result.output.splitlines() if "│ all " in line]
    tried, *parts, wrong = (int(cell) for cell in total.split("│") if cell.strip().isdigit())
    assert tried == sum(parts) >= 15
    assert wrong == 0


def test_a_wrong_rewrite_is_counted_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, weights_dropped)
    result = run("qwen3_moe batched_mm", "--others", "0")
    assert result.exit_code == 1
    assert "WRONG: qwen3_moe batched_mm, swapped gate and up, " in result.output


def test_no_case_of_that_name_fails() -> None:
    assert run("no such block").exit_code == 1


def test_any_captured_graph_with_one_layer_can_be_measured() -> None:
    case = captured(block("qwen3_moe", num_experts=4), tokens(1, 6, 64))
    counts, wrong = measure("small", case)
    assert wrong == []
    assert sum(found["equal"] for found in counts.values()) > 10


def test_a_graph_without_a_layer_has_no_mistakes() -> None:
    case = captured(lambda x: x + 1, tokens(2, 3))
    with pytest.raises(ValueError, match="expected one MoE layer"):
        layer_of(case.module)
