"""The example of docs/training.md runs: two ranks teach, four go on, one process writes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="Trainer needs it")

SCRIPT = Path(__file__).with_name("fine_tune.py")


def said(ranks: int, *words: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(SCRIPT), *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loss_after(steps: int, ranks: int, out: Path) -> float:
    text = said(ranks, "train", "--out", str(out), "--steps", str(steps))
    found = re.search(rf"step {steps} on {ranks} ranks: loss (\S+) a byte", text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example(tmp_path: Path) -> None:
    first = loss_after(20, 2, tmp_path)
    assert loss_after(40, 4, tmp_path) < first < 5.0
    assert said(1, "write", "--out", str(tmp_path), "--prompt", "The ").startswith("The ")
