"""The vLLM suite in its own environment: ``python -m tests.vllm_plugin [PYTEST ARGUMENTS]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.vllm_plugin.environment import Unavailable, environment

_FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> int:
    try:
        python = environment()
    except Unavailable as reason:
        print(f"SKIPPED: the vLLM suite did not run: {reason}", file=sys.stderr)
        return 0
    command = [str(python), "-m", "pytest", "-m", "", str(_FOLDER), *arguments]
    return subprocess.run(command, cwd=_FOLDER.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
