"""Private torch names that ``shard.py`` needs; to be merged into ``compat.py``.

Checked on torch 2.13 (CPU).
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives  # registers the gradients of its ops
from torch import Tensor
from torch._C import _dispatch_has_kernel_for_dispatch_key

__all__ = ["all_gather_rows"]

# Up to torch 2.10 the functional all-gather has no gradient; its twin in another namespace has.
_GATHER_HAS_AUTOGRAD = _dispatch_has_kernel_for_dispatch_key(
    "_c10d_functional::all_gather_into_tensor", "Autograd"
)


def all_gather_rows(shard: Tensor, group_size: int, group_name: str) -> Tensor:
    """``[n, ...]`` on each rank to ``[group_size * n, ...]``, in rank order, waited for.

    The gradient is the reduce-scatter (sum) of the whole tensor's gradients. Traces as
    ``all_gather_into_tensor`` and ``wait_tensor``.
    """
    namespace = (
        torch.ops._c10d_functional if _GATHER_HAS_AUTOGRAD else torch.ops._c10d_functional_autograd
    )
    pending = namespace.all_gather_into_tensor(shard, group_size, group_name)
    return torch.ops._c10d_functional.wait_tensor(pending)
