"""The vLLM suite in its own environment: ``python -m tests.vllm_plugin [PYTEST ARGUMENTS]``.

Then, in the same environment with torch_npu beside (`tests.npu.environment`), the part of it that
is about vLLM-Ascend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.vllm_plugin.environment import Unavailable, ascend_sources, environment

_FOLDER = Path(__file__).parent
_ROOT = _FOLDER.parents[1]
_PRINT_NPU = (
    "from tests.npu.environment import environment as e, Unavailable\n"
    "try: print(e().python, e().libraries)\n"
    "except Unavailable as reason: print(reason)"
)


def main(arguments: list[str]) -> int:
    try:
        python = environment()
    except Unavailable as reason:
        print(f"SKIPPED: the vLLM suite did not run: {reason}", file=sys.stderr)
        return 0
    here = dict(os.environ)
    # More engines at a time than cores: each waits a third of its time for its processes.
    generating = (str(_FOLDER / "test_generate.py"), "-n", "3")
    failed = _pytest([str(python)], [*generating, *arguments], here)
    failed |= _pytest([str(python)], [str(_FOLDER / "test_opened.py"), "-n", "0", *arguments], here)
    failed |= _pytest([str(python)], [str(_ROOT / "tests/docs"), "-n", "0", *arguments], here)
    printed = subprocess.run(
        [str(python), "-c", _PRINT_NPU], cwd=_ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    if len(printed) != 2:
        print(f"SKIPPED: vLLM-Ascend's routes: {' '.join(printed)}", file=sys.stderr)
        return failed
    npu_python, libraries = printed
    others = {name: value for name, value in os.environ.items() if name != "CI"}
    own = {
        "LD_LIBRARY_PATH": libraries,
        "CANN_SHIM_SOC": "Ascend910_9392",
        "PYTHONPATH": str(ascend_sources(python)),
    }
    ascend = [str(_FOLDER / "ascend"), "-n", "0", *arguments]
    return failed | _pytest([npu_python], ascend, others | own)


def _pytest(python: list[str], arguments: Sequence[str], variables: dict[str, str]) -> int:
    """No test chosen by the arguments is no failure."""
    command = [*python, "-m", "pytest", "-m", "vllm", *arguments]
    code = subprocess.run(command, cwd=_ROOT, env=variables).returncode
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
