"""Runs where vLLM, torch_npu and vLLM-Ascend's sources are: `tests.vllm_plugin.__main__`."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("vllm_ascend") is None:
    collect_ignore_glob = ["test_*.py"]
