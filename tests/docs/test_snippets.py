"""Every snippet of README.md and docs/ runs as it stands, as a reader would paste it.

A Python block is saved to a file and run in a process of its own. Where its first line is a comment
that ends in the file's name, the words before the name are the command, as in
``# torchrun --nproc-per-node=2 layer.py``, and blocks further down the page find the file beside
their own. A shell block is run up to its first line that fails.

What the reader has already is there too (`readers_files.py`): a small checkpoint in place of
the ones that are named, after which the two prompts of the README end at different steps, and
``my_model.py``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Sybil
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from tests.docs.readers_files import MY_MODEL, save_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TIMEOUT = 540
"""Seconds for one snippet; that of the README compiles two graphs with Inductor on two ranks."""
_VARIABLES = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PET_STANDALONE": "1",  # torchrun takes a free port: others may be running
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM for CPUs, which asks how much memory, and which cores each rank takes
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}
CHECKPOINTS = ("path/to/Qwen3-MoE", "Qwen/Qwen3-30B-A3B")
PROMPTS = ("Experts are", "The tokens of this rank travel to")
"""Of README.md's first example, whose ranks are done at different steps."""
NEW_TOKENS = 32
COMMANDS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
}
SLOW = {"generate.py", "test_my_moe.py", "with_trainer.py"}
"""Files that take longer than the others together. `.ci/run` runs them too."""
NOT_RUN = {
    "pip install": "it changes the environment that the tests run in; .ci/run installs",
    "vllm serve": "it is a server, which does not end by itself",
    "--device cuda": "it needs a GPU; tests/one_gpu runs the same on the host",
}
ELSEWHERE = ("torch_npu", "torchair", "vllm")
"""Packages that have environments of their own here (`tests.vllm_plugin`), or need hardware."""


@dataclass(frozen=True)
class Snippet:
    """source: as on the page; earlier: files that blocks above it are saved as, and these."""

    page: str
    line: int
    language: str
    source: str
    earlier: tuple[tuple[str, str], ...]

    @property
    def command(self) -> list[str]:
        """The first line's, or as pasted: the file is the last word."""
        said = re.match(r"# (?:(.*) )?(\w+\.py)\n", self.source)
        if said is None:
            return [*COMMANDS["python"], "snippet.py"]
        name, *arguments = (said[1] or "python").split()
        return [*COMMANDS[name], *arguments, said[2]]

    @property
    def file(self) -> str:
        return self.command[-1]


def _snippets() -> list[Snippet]:
    sybil = Sybil([CodeBlockParser("python"), CodeBlockParser("sh")])
    found = []
    for page in PAGES:
        earlier: dict[str, str] = {}
        for example in sybil.parse(page).examples():
            language = example.region.lexemes["arguments"]
            name = page.relative_to(ROOT).as_posix()
            snippet = Snippet(name, example.line, language, example.parsed, tuple(earlier.items()))
            if language == "python":
                earlier[snippet.file] = snippet.source
            found.append(snippet)
    return found


def _parameter(snippet: Snippet) -> Any:
    marks = [pytest.mark.slow] if snippet.file in SLOW else []
    if snippet.page == "docs/vllm.md":
        marks.append(pytest.mark.vllm)
    return pytest.param(snippet, id=f"{snippet.page}:{snippet.line}", marks=marks)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and what its model says to each of `PROMPTS`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_checkpoint(folder, PROMPTS, NEW_TOKENS)


@pytest.mark.timeout(TIMEOUT + 60)
@pytest.mark.parametrize("snippet", [_parameter(snippet) for snippet in _snippets()])
def test_it_runs(snippet: Snippet, checkpoint: tuple[Path, list[str]], tmp_path: Path) -> None:
    for text, reason in NOT_RUN.items():
        if text in snippet.source:
            pytest.skip(reason)
    for package in ELSEWHERE:
        ours = r"(moe_fx\.integrations\.)?"
        needed = re.search(rf"^(import|from) {ours}{package}\b", snippet.source, re.MULTILINE)
        if needed and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    saved, answers = checkpoint
    for name in CHECKPOINTS:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(saved)
    (tmp_path / "my_model.py").write_text(MY_MODEL)
    for name, source in snippet.earlier:
        (tmp_path / name).write_text(source)
    said = _run(snippet, tmp_path)
    if snippet.page == "README.md" and "generate(" in snippet.source:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert prompt + answer in said


def _run(snippet: Snippet, folder: Path) -> str:
    """What it prints. Fails if it fails, or takes longer than `TIMEOUT`."""
    command = ["bash", "-ec", snippet.source]
    if snippet.language == "python":
        command = snippet.command
        (folder / snippet.file).write_text(snippet.source)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | _VARIABLES,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        said, _ = process.communicate()
        pytest.fail(f"{shlex.join(command)} took longer than {TIMEOUT} s:\n{said}")
    assert process.returncode == 0, said
    return said


def test_no_block_is_in_a_language_that_nobody_runs() -> None:
    every = FencedCodeBlockLexer(language=".*")
    found = {
        region.lexemes["language"]
        for page in PAGES
        for region in every(Document(page.read_text(), str(page)))
    }
    assert found <= {"python", "sh", "text"}
