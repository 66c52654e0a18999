"""Ops of the dialect that have kernels of their own on CUDA. The first call imports Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from moe_fx.ops._define import bring

__all__ = ["HAS_TRITON"]

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
"""Whether this torch is for NVIDIA GPUs and Triton compiles for them (on Windows it may not be
there)."""
_KERNELS = {
    "fused_experts": ("experts", "forward"),
    "fused_experts_training": ("experts", "forward_training"),
    "fused_experts_backward": ("backward", "backward"),
    "gating_top_k": ("kernels.gate", "gate"),
    "gating_top_k_training": ("kernels.gate", "gate"),
    "direct_dispatch": ("peers.ops", "dispatch"),
    "direct_combine": ("peers.ops", "combine"),
    "direct_experts": ("peers.ops", "experts"),
}
"""By op: the module of this package and the function in it."""


def _imported(module: str, name: str) -> Callable[..., Any]:
    """The function, of a module that its first call imports."""

    @functools.cache
    def found() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module, __package__), name)
        return function

    return lambda *args, **waiting: found()(*args, **waiting)


if HAS_TRITON:
    for _op, (_module, _name) in _KERNELS.items():
        bring(_op, "CUDA", _imported(f".{_module}", _name))
