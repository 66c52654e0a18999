"""The NPU suite in its own environment: ``python -m tests.npu [PYTEST ARGUMENTS]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.npu.environment import Unavailable, environment

_FOLDER = Path(__file__).parent


def main(arguments: list[str]) -> int:
    try:
        found = environment()
    except Unavailable as reason:
        print(f"SKIPPED: the NPU suite did not run: {reason}", file=sys.stderr)
        return 0
    # By file, so that few ranks are started.
    command = [str(found.python), "-m", "pytest", "--dist", "loadfile", str(_FOLDER), *arguments]
    return subprocess.run(command, env=found.variables(), cwd=_FOLDER.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
