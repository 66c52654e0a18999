"""Runs where torch_npu is: in the environment that ``python -m tests.npu`` makes."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
