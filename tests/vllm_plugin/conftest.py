"""Runs where vLLM is: in the environment that ``python -m tests.vllm_plugin`` makes."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
