"""The dialect's ops that have kernels of their own on CUDA. Triton is imported with the first call.

The router's op keeps its ATen kernel where ours does not take it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from moe_fx.ops._define import bring
from moe_fx.ops.routing import gating_top_k_in_aten

__all__ = ["HAS_TRITON"]

HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
"""Whether this torch is for NVIDIA GPUs and Triton compiles for them (on Windows it may not be
there)."""


def _forward(*args: Any) -> Tensor:
    from moe_fx.devices.cuda.experts import forward

    return forward(*args)


def _forward_training(*args: Any) -> tuple[Tensor, ...]:
    from moe_fx.devices.cuda.experts import forward_training

    return forward_training(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from moe_fx.devices.cuda.backward import backward

    return backward(*args)


def _gate(logits: Tensor, k: int, *args: Any) -> tuple[Tensor, Tensor]:
    from moe_fx.devices.cuda.kernels.gate import gate, misfit
    from moe_fx.devices.cuda.launch import on

    if misfit(logits.shape[1], k, num_groups=args[2]):
        return gating_top_k_in_aten(logits, k, *args)
    with on(logits):
        return gate(logits, k, *args)


def _dispatch(*args: Any, **waiting: Any) -> tuple[Tensor, ...]:
    from moe_fx.devices.cuda.peers.ops import dispatch

    return dispatch(*args, **waiting)


def _combine(*args: Any, **waiting: Any) -> tuple[Tensor, ...]:
    from moe_fx.devices.cuda.peers.ops import combine

    return combine(*args, **waiting)


def _direct_experts(*args: Any, **waiting: Any) -> Tensor:
    from moe_fx.devices.cuda.peers.ops import experts

    return experts(*args, **waiting)


if HAS_TRITON:
    bring("fused_experts", "CUDA", _forward)
    bring("fused_experts_training", "CUDA", _forward_training)
    bring("fused_experts_backward", "CUDA", _backward)
    bring("gating_top_k", "CUDA", _gate)
    bring("gating_top_k_training", "CUDA", _gate)
    bring("direct_dispatch", "CUDA", _dispatch)
    bring("direct_combine", "CUDA", _combine)
    bring("direct_experts", "CUDA", _direct_experts)
