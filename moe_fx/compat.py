"""Every private torch import of the project, so that a torch release breaks one file.

Checked on torch 2.11 (CUDA) and 2.13 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the gradients of its ops
from torch import SymInt, Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.output_graph import GraphCompileReason
from torch._functorch.aot_autograd import aot_export_module
from torch._library.fake_impl import allocate_size
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import get_ctx

__all__ = [
    "all_gather_rows",
    "base_compiler",
    "data_dependent_size",
    "export_functional",
    "graph_breaks",
    "group_store",
    "resolve_group",
    "statically_known_true",
]


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group registered under ``name`` (``ProcessGroup.group_name``)."""
    return _resolve_process_group(cast(Any, name))


def data_dependent_size() -> SymInt | int:
    """A fresh unbacked size, from within a fake kernel.

    Not ``get_ctx().new_dynamic_size()``: that refuses unless Dynamo was told to capture ops with
    data-dependent shapes, which ``torch.compile`` does only under ``fullgraph=True``. The model's
    own graph has no such op; ours are put in later.
    """
    return allocate_size(get_ctx()._shape_env, min_val=0)


def export_functional(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """(functional ATen graph before decomposition and autograd, its signature)."""
    exported, signature = aot_export_module(
        module, list(inputs), trace_joint=False, pre_dispatch=True, decompositions={}
    )
    assert isinstance(exported, GraphModule)
    return exported, signature


def graph_breaks(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """Why Dynamo captures ``fn(*args, **kwargs)`` in more than one graph: ``reason (at
    file:line)``."""
    return [
        _described(reason) for reason in torch._dynamo.explain(fn)(*args, **kwargs).break_reasons
    ]


def _described(reason: GraphCompileReason) -> str:
    said = " ".join(line.strip() for line in reason.reason.splitlines()[:2])
    frame = reason.user_stack[-1] if reason.user_stack else None
    return f"{said} (at {frame.filename}:{frame.lineno})" if frame else said


def base_compiler(name: str) -> Callable[[GraphModule, list[Any]], Callable[..., Any]]:
    """The torch.compile backend called ``name``."""
    return lookup_backend(name)


def group_store(group: dist.ProcessGroup) -> dist.Store:
    """The key-value store the group's ranks share."""
    return group.get_group_store()


def all_gather_rows(shard: Tensor, group_size: int, group_name: str) -> Tensor:
    """``[n, ...]`` on each rank to ``[group_size * n, ...]``, in rank order, waited for.

    The gradient is the reduce-scatter (sum) of the whole tensor's gradients. Traces as
    ``all_gather_into_tensor`` and ``wait_tensor``.
    """
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(
        collectives.all_gather_into_tensor(shard, group_size, group_name)
    )
