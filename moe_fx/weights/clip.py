"""``clip_grad_norm_`` for a model whose experts are sharded: one norm, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

__all__ = ["clip_grad_norm_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, which refuses shards beside whole tensors.

    The norm is that of the whole model's gradients, all ranks' experts included. Every rank calls
    this, with the same parameters. Gradients that are not sharded must be equal on all ranks, as
    they are once data parallelism has reduced them.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts: dict[DeviceMesh | None, list[Any]] = {}
    for param in given:
        grad: Any = param.grad
        if grad is not None:
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            parts.setdefault(mesh, []).append(param)
    norms = []
    for params in parts.values():
        norm: Any = get_total_norm([p.grad for p in params], norm_type, foreach=foreach)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    # Checks that the norm is finite, if asked to; the norms themselves are plain tensors.
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for params in parts.values():
        clip_grads_with_norm_(params, max_norm, total, foreach)
    return total if norms else torch.tensor(0.0)
