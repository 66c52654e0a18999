"""Models generated with by vLLM itself, on one rank and on two with their experts apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.vllm_plugin.generate import LENGTH, PROMPTS
from tests.vllm_plugin.models import MODELS, write

pytestmark = pytest.mark.vllm
OURS = {"inductor_passes": {"post_grad_custom_post_pass": "moe_fx.vllm_pass"}}
APART = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
TRAVELLING = json.dumps({"strategy": "alltoall", "overlap": 2, "strict": True})
COUNT = len(MODELS) * len(PROMPTS)
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    code: int
    log: str

    @property
    def tokens(self) -> list[list[list[int]]]:
        assert self.code == 0, self.log[-6000:]
        [line] = [line for line in self.log.splitlines() if line.startswith("TOKENS")]
        found: list[list[list[int]]] = json.loads(line.removeprefix("TOKENS"))
        return found


@dataclass(frozen=True)
class Generator:
    """folder: of the models, and of what all tests find out once."""

    folder: Path

    def run(self, request: dict[str, Any], options: str = "") -> Run:
        two = request["args"].get("tensor_parallel_size") == 2
        own = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process that asks it
            "VLLM_CACHE_ROOT": str(self.folder / "cache"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1" if two else "auto",
            "MOE_FX_VLLM_OPTIONS": options,
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm_plugin.generate", json.dumps(request)],
            cwd=_ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Run(done.returncode, done.stdout)

    def model(self, kind: str) -> str:
        with FileLock(self.folder / "lock"):
            if not (self.folder / kind).exists():
                write(kind, self.folder)
        return str(self.folder / kind)

    def of_one_rank(self, kind: str) -> list[list[list[int]]]:
        """What vLLM generates by itself, not compiled."""
        models = [self.model(each) for each in MODELS]
        found = self.folder / "one_rank.json"
        with FileLock(self.folder / "lock_of_one_rank"):
            if not found.exists():
                request = {"model": models, "args": {"enforce_eager": True}}
                found.write_text(json.dumps(self.run(request).tokens))
        tokens: list[list[list[int]]] = json.loads(found.read_text())
        assert [len(each) for of_model in tokens for each in of_model] == [LENGTH] * COUNT
        return [tokens[list(MODELS).index(kind)]]


@pytest.fixture
def generator(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Generator:
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "models"
    folder.mkdir(exist_ok=True)
    return Generator(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MODELS)
def test_two_ranks_generate_what_one_does(generator: Generator, kind: str) -> None:
    arguments = {**APART, "compilation_config": OURS}
    run = generator.run({"model": [generator.model(kind)], "args": arguments})
    assert run.tokens == generator.of_one_rank(kind)
    assert run.log.count("1 MoE layers opened: replicated") == 2  # one for each rank


@pytest.mark.timeout(600)
def test_the_opaque_op_piecewise_and_from_a_warm_cache(generator: Generator) -> None:
    """Brought back from the cache as it was rewritten: without the pass two ranks crash."""
    arguments = {**APART, "compilation_config": OURS}
    kind = "glm4_moe"
    request = {"model": [generator.model(kind)], "piecewise": True, "args": arguments}
    first = generator.run(request, TRAVELLING)
    second = generator.run(request, TRAVELLING)
    expected = generator.of_one_rank(kind)
    assert [first.tokens, second.tokens] == [expected, expected]
    assert "MoE layers opened: alltoall" in first.log
    assert "MoE layers opened" not in second.log  # not compiled again


@pytest.mark.timeout(600)
def test_two_ranks_crash_without_the_pass(generator: Generator) -> None:
    """If this fails, vLLM's kernels for CPUs can do without us."""
    request = {"model": [generator.model("qwen3_moe")], "args": {**APART, "enforce_eager": True}}
    run = generator.run(request)
    assert run.code != 0
    assert "died unexpectedly" in run.log
