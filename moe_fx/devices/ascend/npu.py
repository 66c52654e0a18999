"""Every import of torch_npu's internals, so that a torch_npu release breaks one file.

Checked on torch_npu 2.13.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from moe_fx.compat import base_compiler, group_tag, resolve_group
from moe_fx.errors import ConfigurationError

COMPILERS = ("npugraph_ex", "torchair")


def require_torch_npu(base: str) -> None:
    """Raises `ConfigurationError` unless torch_npu, which has the compiler ``base``, is there."""
    if importlib.util.find_spec("torch_npu") is None:
        raise ConfigurationError(
            f"base={base!r} is a compiler of torch_npu, which is not installed. Install the "
            "torch_npu of your torch and CANN version, or use base='inductor'."
        )


def tag_and_ranks(group_name: str) -> tuple[str, list[int]]:
    """How torch_npu's collectives name a process group."""
    group = resolve_group(group_name)
    return group_tag(group), list(dist.get_process_group_ranks(group))


def communicator_name(group_name: str) -> str:
    """HCCL's name of the group on this rank, for MC2."""
    group = resolve_group(group_name)
    backend = cast(Any, group)._get_backend(torch.device("npu"))
    name: str = backend.get_hccl_comm_name(dist.get_rank())
    return name


def all_to_all_op() -> Callable[..., Any]:
    """``npu_define::all_to_all_single_npu``, of whichever compiler was loaded first."""
    if not hasattr(torch.ops.npu_define, "all_to_all_single_npu"):
        npugraph_ex()
    return cast(Callable[..., Any], torch.ops.npu_define.all_to_all_single_npu.default)


def npugraph_ex() -> Any:
    """The module, with the ops that it registers."""
    require_torch_npu("npugraph_ex")
    import torch_npu  # noqa: F401
    import npugraph_ex as module  # isort: skip
    import npugraph_ex.ops._tagged_event  # isort: skip

    return module


_ONE_OF_BOTH = (
    "torchair can't be used in a process that has used npugraph_ex (torch_npu 2.13). Use one of "
    "them in a process, or torchair first"
)


def torchair() -> Any:
    """The module, with its converters. Raises `ConfigurationError` if npugraph_ex was before."""
    require_torch_npu("torchair")
    import torch_npu  # noqa: F401
    import torchair as module  # isort: skip

    try:
        import torchair._ge_concrete_graph.ge_converter.experimental.hcom_allgather
        import torchair._ge_concrete_graph.ge_converter.experimental.hcom_alltoall
    except ImportError as error:
        raise ConfigurationError(f"{_ONE_OF_BOTH}: {error}") from error
    return module


def torchair_compiler(config: Any) -> Callable[..., Any]:
    """The torch.compile backend. Raises `ConfigurationError` if npugraph_ex was before."""
    try:
        compiler: Callable[..., Any] = torchair().get_npu_backend(compiler_config=config)
    except RuntimeError as error:  # both register the same decompositions
        raise ConfigurationError(f"{_ONE_OF_BOTH}: {error}") from error
    return compiler


def create_event(tag: str) -> None:
    """The event that ``tagged_event_record/wait(tag, True)`` mean; recorded with the graph, so that
    code from a cache makes it again."""
    from npugraph_ex._acl_concrete_graph.graph_pass import _create_event_by_name

    _create_event_by_name(tag)


def npugraph_ex_compiler() -> Callable[..., Any]:
    """The torch.compile backend."""
    npugraph_ex()
    return base_compiler("npugraph_ex")


def ge_api() -> tuple[Any, Any]:
    """(what makes GE ops, GE's int64)."""
    torchair()
    from torchair._ge_concrete_graph import ge_apis
    from torchair.ge._ge_graph import DataType

    return ge_apis, DataType.DT_INT64


def ge_group(group_name: str) -> Any:
    """HCCL's name of a group, for a GE op."""
    from torchair._ge_concrete_graph.hcom_utils import get_group_name_and_record

    tag, ranks = tag_and_ranks(group_name)
    return get_group_name_and_record(tag, ranks, len(ranks))


def keep_in_ge(tensor: Any) -> None:
    """GE is not to drop what computes ``tensor`` if nothing reads it: other ranks wait for it."""
    from torchair.ge._ge_graph import dont_prune_me

    dont_prune_me(tensor)


def size_and_rank(group_name: str) -> tuple[int, int]:
    group = resolve_group(group_name)
    return group.size(), group.rank()


def device() -> Any:
    """The module ``torch.npu``."""
    import torch_npu

    return torch_npu.npu


def generation() -> str:
    """A2 or A3, or else the name of the device."""
    name: str = device().get_device_name()
    for prefix, known in (("Ascend910_93", "A3"), ("Ascend910B", "A2")):
        if name.startswith(prefix):
            return known
    return name
