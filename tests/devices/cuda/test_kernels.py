"""The GPU's kernels, by value, on the CPU: Triton's interpreter runs them in a process of its own.

On a machine with a GPU the same cases run on it (`tests/e2e/test_cuda_experts.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.devices.cuda.cases import CASES

pytest.importorskip("triton", minversion="3.7", reason="earlier interpreters need an older NumPy")


@pytest.mark.parametrize("kind", CASES)
def test_by_value(kind: str) -> None:
    """Every case of the kind, against the op's ATen kernel in float64."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.devices.cuda.cases", "--device", "cpu", kind],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
