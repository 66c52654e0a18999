"""Graphs for torchair: lowered to what GE graphs hold, exchanges labelled with their stream.

An exchange of sizes that the routing says is ``moe_fx::exchange``, whose converter gives GE the
sizes as tensors of the graph (HcomAllToAllV): the host need not know them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.device_pass import DevicePass, is_dialect
from moe_fx.devices.ascend.emit import Emit
from moe_fx.devices.ascend.ge_lowerings import GE_LOWERINGS, note_experts
from moe_fx.devices.ascend.lowerings import is_swiglu, swiglu
from moe_fx.devices.ascend.streams import StreamOps, use_streams
from moe_fx.errors import ConfigurationError
from moe_fx.options import Options
from moe_fx.passes.lower.lower import lower
from moe_fx.region import Lowered, source_of

ops = torch.ops.moe_fx


class GePass(DevicePass):
    """For torchair's ``post_grad_custom_pre_pass``. Raises `ConfigurationError` if an op is left
    that GE does not know."""

    def _lower(self, graph: Graph) -> list[Lowered]:
        register_converters()
        note_experts(graph)
        done = lower(graph, Emit, GE_LOWERINGS, {is_swiglu: swiglu})
        air = torch.ops.air
        enter, leave = air.scope_enter.default, air.scope_exit.default
        done += use_streams(graph, StreamOps(enter, leave, None, self.options.exchange_cores))
        done += _drop_agreement(graph)
        _check_converters(graph, done)
        return done


def _drop_agreement(graph: Graph) -> list[Lowered]:
    done = []
    for node in graph.find_nodes(op="call_function", target=ops.agree.default):
        why = "GE graphs hold no check of the host's: that ranks planned the same is not checked"
        done.append(Lowered("moe_fx.ranks.agree", (), node.name, source_of(node), why))
        graph.erase_node(node)
    return done


def _check_converters(graph: Graph, done: Sequence[Lowered]) -> None:
    left = [n for n in graph.nodes if n.op == "call_function" and _is_foreign(n)]
    if left:
        reasons = {f"{each.op}: {each.kept}" for each in done if each.kept}
        names = sorted({str(node.target) for node in left})
        raise ConfigurationError(
            f"base='torchair' does not know {', '.join(names)} (first at {source_of(left[0])}). "
            + (f"{'; '.join(sorted(reasons))}. " if reasons else "")
            + "Use strategy='allgather', or 'alltoall' in one chunk, or base='npugraph_ex'."
        )


def _is_foreign(node: Node) -> bool:
    return is_dialect(node) and node.target not in _CONVERTED


_CONVERTED = (ops.exchange.default,)


@functools.cache
def register_converters() -> None:
    """Teach torchair the one op of ours that GE graphs hold."""
    torchair = npu.torchair()
    ge, tensor_type = npu.ge_api()

    @torchair.register_fx_node_ge_converter(ops.exchange.default)
    def convert(
        rows: Any, send_counts: Any, recv_counts: Any, group: str, meta_outputs: Any = None
    ) -> Any:
        """moe_fx::exchange(Tensor rows, Tensor send_counts, Tensor recv_counts, str group)"""
        features = [int(size) for size in rows.symsize[1:]]
        width = math.prod(features)
        counts = [
            ge.Mul(ge.Cast(each, dst_type=tensor_type), ge.Const(width, dtype=tensor_type))
            for each in (send_counts, recv_counts)
        ]
        starts = [ge.Cumsum(each, ge.Const(0), exclusive=True, reverse=False) for each in counts]
        arrived = ge.HcomAllToAllV(
            send_data=rows,
            send_counts=counts[0],
            send_displacements=starts[0],
            recv_counts=counts[1],
            recv_displacements=starts[1],
            group=npu.ge_group(group),
        )
        npu.keep_in_ge(arrived)
        return ge.Reshape(arrived, ge.Const([-1, *features]))


def compile_ge(
    module: GraphModule, inputs: Sequence[Any], own: DevicePass, options: Options
) -> Callable[..., Any]:
    """``module`` compiled by torchair."""
    config = npu.torchair().CompilerConfig()
    for name, value in own.among(options.base_options).items():
        _set(config, name, value)
    compiled: Callable[..., Any] = npu.torchair_compiler(config)(module, list(inputs))
    return compiled


def _set(config: Any, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for each in path:
        config = getattr(config, each, None)
    if not hasattr(config, last):
        raise ConfigurationError(f"base_options: torchair's CompilerConfig has no {name!r}")
    setattr(config, last, value)
