"""An environment with the real torch_npu and no NPU: beside this one, sharing its packages.

An installed torch_npu breaks ``import torch`` where CANN is absent, so it has an environment of its
own, and stand-ins for CANN's libraries (`shim/build.py`). Made once, in ``~/.cache/moe_fx``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TORCH_NPU = "2.13.0"
_HERE = Path(__file__).parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe_fx"
_TOOLS = ("gcc", "g++", "nm", "readelf")


class Unavailable(Exception):
    """The environment can't be made here; the message says what is missing."""


@dataclass(frozen=True)
class Environment:
    """python: its interpreter; libraries: the stand-ins."""

    python: Path
    libraries: Path

    def variables(self) -> dict[str, str]:
        """Without CI: where that is set torch makes an error of an op that returns its input, and
        torch_npu's ``_npu_moe_token_unpermute`` does."""
        others = {name: value for name, value in os.environ.items() if name != "CI"}
        own = {"LD_LIBRARY_PATH": str(self.libraries), "CANN_SHIM_SOC": "Ascend910_9392"}
        return others | own


def environment() -> Environment:
    """Raises `Unavailable`."""
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        raise Unavailable(f"{', '.join(absent)} not found: the stand-ins for CANN can't be built")
    packages = sysconfig.get_path("purelib")
    described = [TORCH_NPU, sys.version, packages]
    described += [file.read_text() for file in sorted((_HERE / "shim").glob("*.*"))]
    folder = _CACHE / f"npu-{hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"
    found = Environment(folder / "venv/bin/python", folder / "shim")
    complete = folder / "complete"
    if not complete.exists():
        _remove_stale()
        shutil.rmtree(folder, ignore_errors=True)
        _make(found, packages)
        complete.write_text(packages)
    return found


def _remove_stale() -> None:
    """Environments that shared the packages of one that is gone."""
    for complete in _CACHE.glob("npu-*/complete"):
        if not Path(complete.read_text() or ".").is_dir():
            shutil.rmtree(complete.parent)


def _make(made: Environment, packages: str) -> None:
    venv = made.python.parent.parent
    _run(sys.executable, "-m", "venv", str(venv))
    [own] = venv.glob("lib/python*/site-packages")
    (own / "shared.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    wanted = [f"torch_npu=={TORCH_NPU}", "protobuf", "pyyaml"]
    try:
        _run(str(made.python), "-m", "pip", "install", "-q", "--no-deps", *wanted)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "no message").strip().splitlines()[-1]
        raise Unavailable(f"torch_npu {TORCH_NPU} can't be installed: {last}") from error
    build = str(_HERE / "shim/build.py")
    try:
        _run(str(made.python), build, str(made.libraries), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{build} failed:\n{error.stderr}") from error


def _run(*command: str, **variables: str) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **variables}
    )
