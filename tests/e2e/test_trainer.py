"""transformers' Trainer on ranks that share the experts: trains, saves, resumes as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeForCausalLM, Trainer, TrainingArguments

from tests.passes.graphs import relative_error

pytest.importorskip("accelerate", reason="Trainer needs it")

EXACT = 1e-5
ROUNDED = 2e-2
"""In bfloat16."""
_ENDS = 500.0


def run(ranks: int, out: Path, *options: str) -> tuple[int, str]:
    """The exit status, and what was printed."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["tests.e2e.trainer", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_ENDS, env=environment, check=False
    )
    return done.returncode, done.stdout + done.stderr


def logged(ranks: int, out: Path, *options: str) -> Any:
    status, said = run(ranks, out, *options)
    lines = [line.partition("LOGGED ")[2] for line in said.splitlines() if "LOGGED " in line]
    assert status == 0 and lines, said[-4000:]
    return json.loads(lines[0])


Run = tuple[Path, Any]
"""The folder, and what was logged."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On one process, by transformers' own Trainer."""
    out = tmp_path_factory.mktemp("whole")
    return out, logged(1, out)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("sharded")
    return out, logged(2, out, "--sharded", "--compiled")


def same(one: Any, other: Any, tolerance: float) -> None:
    assert one["best"] == other["best"]
    for mine, right in zip(one["history"], other["history"], strict=True):
        assert mine == pytest.approx(right, rel=tolerance)


def same_weights(one: Path, other: Path, tolerance: float = EXACT) -> None:
    mine, right = (Qwen3MoeForCausalLM.from_pretrained(each).state_dict() for each in (one, other))
    assert mine.keys() == right.keys()
    for name, tensor in right.items():
        assert relative_error(tensor, mine[name]) <= tolerance, name


def experts_of(checkpoint: Path) -> torch.Tensor:
    model: Any = Qwen3MoeForCausalLM.from_pretrained(checkpoint)
    return model.model.layers[1].mlp.experts.gate_up_proj.detach()


@pytest.mark.timeout(600)
def test_losses_norms_and_evaluation_are_those_of_one_process(whole: Run, sharded: Run) -> None:
    """With accumulation, checkpointing of activations, clipping and a schedule."""
    same(sharded[1], whole[1], EXACT)


@pytest.mark.timeout(600)
def test_checkpoints_and_the_best_model_are_those_of_one_process(whole: Run, sharded: Run) -> None:
    """They are of a model that has been trained, in its experts too.
    (What transformers' Trainer has loaded as the best model is not compared: of 5.24 and this
    model its experts are still the last ones, whose names in a checkpoint are others.)"""
    for folder in ("checkpoint-4", "checkpoint-8"):
        same_weights(sharded[0] / folder, whole[0] / folder)
    early, late = (experts_of(sharded[0] / f"checkpoint-{step}") for step in (4, 8))
    assert relative_error(early, late) > 1e-3
    same_weights(sharded[0] / "last", whole[0] / f"checkpoint-{whole[1]['best']}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_it_resumes_on_any_number_of_ranks(
    ranks: int, whole: Run, sharded: Run, tmp_path: Path
) -> None:
    checkpoint = sharded[0] / "checkpoint-4"
    found = logged(ranks, tmp_path, "--sharded", "--resume", str(checkpoint))
    same(found, whole[1], EXACT)
    same_weights(tmp_path / "checkpoint-8", whole[0] / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_in_bfloat16(tmp_path: Path) -> None:
    right = logged(1, tmp_path / "whole", "--bf16")
    same(logged(2, tmp_path / "sharded", "--bf16", "--sharded", "--compiled"), right, ROUNDED)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_on_attention(tmp_path: Path) -> None:
    right = logged(1, tmp_path / "whole", "--lora")
    same(logged(2, tmp_path / "sharded", "--lora", "--sharded"), right, EXACT)
    mine, wanted = (_adapters(tmp_path / kind) for kind in ("sharded", "whole"))
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6)


def _adapters(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "last" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_optimizer_state_of_a_whole_model_is_refused(whole: Run, tmp_path: Path) -> None:
    status, said = run(2, tmp_path, "--sharded", "--resume", str(whole[0] / "checkpoint-4"))
    assert status != 0
    assert "is the optimizer state of a model that is not sharded" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--wrong", "fsdp"], "Switch FSDP and DeepSpeed off"),
        (["--wrong", "fp16"], "Give bf16=True"),
        (["--plain"], "Use moe_fx.integrations.trainer.ExpertParallelTrainer"),
    ],
)
def test_what_would_train_otherwise_is_refused(
    options: list[str], reason: str, tmp_path: Path
) -> None:
    status, said = run(2, tmp_path, "--sharded", *options)
    assert status != 0
    assert reason in " ".join(said.split())


def test_training_arguments_know_no_backend_of_others(tmp_path: Path) -> None:
    """So docs/training.md says to compile the model first. May this fail one day."""
    arguments = TrainingArguments(
        str(tmp_path), torch_compile_backend="moe_fx", use_cpu=True, report_to=[]
    )
    with pytest.raises(ValueError, match="MOE_FX"):
        Trainer(torch.nn.Linear(2, 2), arguments)
