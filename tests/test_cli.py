"""``moe-fx demo`` and ``moe-fx explain`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_fx.cli import app
from moe_fx.demo import Outcome, Verdict

FACTORY = """
import torch
from tests.e2e.ranks import expert_block

def make():
    return expert_block(), (torch.randn(1, 6, 64),)

def dense():
    return torch.nn.Linear(4, 4), (torch.randn(2, 4),)
"""


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_demo_on_two_ranks_is_equal_token_for_token() -> None:
    code, output = run("demo", "--model", "qwen3_moe", "--base", "eager", "--tokens", "4")
    assert code == 0, output
    assert "2 of 2" in output
    assert "(50%)" in output
    assert "all equal" in output


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"tokens_equal": False}, False),
        ({"moe_layers": 3}, False),
        ({"expert_bytes": 100}, False),
    ],
)
def test_demo_fails_if_anything_differs(change: dict[str, int], passed: bool) -> None:
    nothing = torch.zeros(0)
    expert_bytes = change.pop("expert_bytes", 50)
    outcome = Outcome(nothing, nothing, 2, [], expert_bytes, 100, 0)
    fields = {"model": "m", "moe_layers": 2, "max_difference": 0.0, "tokens_equal": True}
    assert Verdict(outcomes=[outcome] * 2, seconds=0.0, **(fields | change)).passed == passed


def test_explain_a_transformers_family() -> None:
    code, output = run("explain", "hf:deepseek_v3", "--implementation", "batched_mm")
    assert code == 0
    assert "MoE layers found: 2" in output
    assert "sigmoid" in output
    assert "batched_mm" in output


def test_explain_a_factory_writes_json_and_html(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    code, _ = run(
        "explain",
        f"{file}:make",
        "--json",
        str(tmp_path / "r.json"),
        "--html",
        str(tmp_path / "r.html"),
    )
    assert code == 0
    [region] = json.loads((tmp_path / "r.json").read_text())["regions"]
    assert (region["num_experts"], region["top_k"], region["verified"]) == (8, 2, True)
    assert "MoE layers found: 1" in (tmp_path / "r.html").read_text()


def test_explain_a_model_without_experts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    code, output = run("explain", f"{file}:dense")
    assert code == 0
    assert "No MoE layer found" in output


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hf:no_such_model", "no model type 'no_such_model'"),
        ("missing.py:make", "There is no file 'missing.py'"),
        ("qwen3_moe", "Give hf:MODEL_TYPE"),
    ],
)
def test_explain_says_what_a_target_looks_like(target: str, said: str) -> None:
    code, output = run("explain", target)
    assert code == 2
    assert said in output.replace("\n", " ")


def test_help_teaches() -> None:
    _, output = run("demo", "--help")
    assert "Exit status 1 if anything differs" in " ".join(output.split())
