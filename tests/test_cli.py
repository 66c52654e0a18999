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

def sampling():
    block = expert_block()
    def _model(x):
        scores = block(x)
        return scores.softmax(-1).topk(4).values.sum(), scores.view(6, 64).topk(3).indices
    return _model, [torch.randn(1, 6, 64)]

def only_a_model():
    return torch.nn.Linear(4, 4)
"""


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    return result.exit_code, " ".join(result.output.split())


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


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories_of_a_user.py"
    file.write_text(FACTORY)
    return file


def test_explain_for_ranks_dtype_and_dynamic_shapes(factories: Path, tmp_path: Path) -> None:
    written = tmp_path / "r.json"
    options = ("--ranks", "4", "--dtype", "float64", "--dynamic", "--json", str(written))
    code, output = run("explain", f"{factories}:make", *options)
    assert code == 0, output
    report = json.loads(written.read_text())
    assert report["plans"][0]["world_size"] == 4
    assert report["regions"][0]["program"] == "replicated"
    verification = report["regions"][0]["verification"]
    assert (verification["ranks"], verification["tolerance"]) == (4, 1e-10)


def test_explain_fails_if_no_layer_was_found(factories: Path) -> None:
    code, output = run("explain", f"{factories}:dense")
    assert code == 1
    assert "No MoE layer found" in output


def test_explain_fails_if_every_candidate_was_declined(factories: Path) -> None:
    code, output = run("explain", f"{factories}:make", "--ranks", "3")
    assert code == 1
    assert "8 experts do not divide by 3 ranks" in output


def test_strict_fails_if_a_candidate_was_declined(factories: Path) -> None:
    assert run("explain", f"{factories}:sampling")[0] == 0
    code, output = run("explain", f"{factories}:sampling", "--strict")
    assert code == 1
    assert "never bring tokens to experts" in output


def test_strict_does_not_count_attention_to_selected_tokens() -> None:
    code, output = run("explain", "hf:deepseek_v32", "--strict")
    assert code == 0
    assert "Declined: 3" in output


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hf:no_such_model", "no model type 'no_such_model'"),
        ("hf:qwen3_mo", "Did you mean qwen3_moe"),
        ("hf:vit", "no causal language model of type 'vit'"),
        ("missing.py:make", "There is no file 'missing.py'"),
        ("qwen3_moe", "Give hf:MODEL_TYPE"),
        (
            "{file}:mak",
            "has no function 'mak'. Its functions: dense, expert_block, make, only_a_model",
        ),
        ("{file}:only_a_model", "returned a Linear, expected (model, args)"),
    ],
)
def test_explain_says_what_a_target_looks_like(factories: Path, target: str, said: str) -> None:
    code, output = run("explain", target.format(file=factories))
    assert code == 2
    assert said in output


def test_an_implementation_that_a_family_does_not_have() -> None:
    code, output = run("explain", "hf:llama", "--implementation", "grouped_mm")
    assert code == 2
    assert "does not support setting experts implementation" in output


def test_an_unknown_dtype_is_answered_with_the_known_ones() -> None:
    code, output = run("explain", "hf:qwen3_moe", "--dtype", "int8")
    assert code == 2
    assert "bfloat16" in output


def test_help_teaches() -> None:
    _, output = run("demo", "--help")
    assert "Exit status 1 if anything differs" in output
    _, output = run("explain", "--help")
    assert "0 if an MoE layer was found; 1 if none was" in output
    for option in ("--html", "--json", "--dynamic", "--dtype", "--ranks", "--strict"):
        assert option in output
