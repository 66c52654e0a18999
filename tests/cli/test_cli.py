"""``moe-fx demo`` and ``moe-fx explain`` as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import moe_fx
from moe_fx.cli import demo
from moe_fx.cli.demo import Outcome, Verdict
from moe_fx_cli import app

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

def raising():
    raise KeyError("no weights [bold]here[/bold]")

def ill_fitting():
    return torch.nn.Linear(4, 4), (torch.randn(2, 5),)

def needing(path):
    return path

def lowest():
    from tests.testing.layers import LowestScores
    return LowestScores(), (torch.randn(12, 32),)
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
    code, output = run("explain", f"{factories}:lowest")
    assert code == 1
    assert "the selection takes the lowest scores" in output


def test_explain_for_ranks_that_do_not_divide_the_experts(factories: Path) -> None:
    code, output = run("explain", f"{factories}:make", "--ranks", "3")
    assert code == 0, output
    assert "3 ranks of 3 experts at most" in output


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
            "has no function 'mak'. Its functions: dense, expert_block, ill_fitting, lowest, make",
        ),
        ("{file}:only_a_model", "returned a Linear, expected (model, args)"),
        (
            "{file}:raising",
            "failed: KeyError: 'no weights [bold]here[/bold]' (at {file}:22 in raising)",
        ),
        ("{file}:needing", "failed: TypeError: needing() missing 1 required"),
        (
            "{file}:ill_fitting",
            "cannot be run with these arguments: RuntimeError: mat1 and mat2 shapes cannot be",
        ),
    ],
)
def test_explain_says_what_a_target_looks_like(factories: Path, target: str, said: str) -> None:
    code, output = run("explain", target.format(file=factories))
    assert code == 2
    assert said.format(file=factories) in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all' (at "),
        ("def make(:", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("import sys; sys.exit('use me otherwise')", "SystemExit: use me otherwise"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    code, output = run("explain", f"{tmp_path}/broken.py:make")
    assert code == 2
    assert f"broken.py' cannot be imported: {said}" in output


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_file_that_cannot_be_written(factories: Path, option: str) -> None:
    def refused(path: str) -> str:
        code, output = run("explain", f"{factories}:dense", option, path)
        assert code == 2
        return output

    assert "there is no folder '/nowhere'" in refused("/nowhere/report")
    assert "is a folder, expected a file" in refused(str(factories.parent))
    assert "/dev/full cannot be written: No space left on device" in refused("/dev/full")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    for arguments in (("demo",), ("explain", "hf:qwen3_moe")):
        code, output = run(*arguments)
        assert code == 2
        assert output == (
            "error: This needs transformers, which is not installed: pip install 'moe-fx[hf]'."
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--base", "aot_eagre"), "no backend 'aot_eagre'. Did you mean aot_eager"),
        (("--base", "moe_fx"), "moe_fx would hand its graphs to itself"),
        (("--model", "[red]qwen"), "transformers has no model type '[red]qwen'"),
    ],
)
def test_demo_says_once_what_it_cannot_do(options: tuple[str, ...], said: str) -> None:
    code, output = run("demo", *options)
    assert code == 2
    assert output.count("error: ") == 1
    assert said in output
    assert "Traceback" not in output


def test_what_all_ranks_refuse_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "require_base", lambda _: None)
    code, output = run("demo", "--base", "aot_eagre", "--model", "qwen3_moe", "--tokens", "1")
    assert code == 2
    assert output.count("no backend 'aot_eagre'") == 1
    assert "Traceback" not in output


def test_without_a_torch_that_it_works_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ImportError("moe_fx needs torch >= 2.11")

    for name in [name for name in sys.modules if name.split(".")[0] == "moe_fx"]:
        monkeypatch.delitem(sys.modules, name)
    finder = SimpleNamespace(find_spec=lambda name, *_: refuse() if name == "moe_fx" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    code, output = run("explain", "hf:qwen3_moe")
    assert (code, output) == (2, "error: moe_fx cannot be imported: moe_fx needs torch >= 2.11")


def test_version() -> None:
    code, output = run("--version")
    assert code == 0
    installed = version("torch")  # without what a build adds to it, "+cu130"
    assert output.startswith(f"moe-fx {moe_fx.__version__}, torch {installed}, ")


def test_help_and_version_do_not_wait_for_torch() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from moe_fx_cli import app\n"
        "for arguments in (['--help'], ['--version'], ['demo', '--help'], ['bench', '--help']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "print(sorted({'torch', 'moe_fx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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
    assert "Exit status: 0; 1 if anything differs" in output
    _, output = run("explain", "--help")
    assert "0 if an MoE layer was found; 1 if none was" in output
    for option in ("--html", "--json", "--dynamic", "--dtype", "--ranks", "--strict"):
        assert option in output


@pytest.mark.parametrize("command", [(), ("demo",), ("explain",), ("bench",)])
def test_help_has_examples_and_fits_a_terminal(command: tuple[str, ...]) -> None:
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--help"]).output
    assert f"\n   moe-fx {' '.join(command) or 'demo'} " in output
    assert max(map(len, output.splitlines())) <= 80
    assert "\b" not in output
