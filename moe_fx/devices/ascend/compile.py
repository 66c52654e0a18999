"""A rewritten graph, compiled for an NPU: ordered, lowered, its exchanges on a stream of their own.

All of it happens to the graphs that the base compiler runs, forward and backward, where it hands
them to custom passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from moe_fx.compat import aot_eager_compiler
from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.device_pass import DevicePass
from moe_fx.devices.ascend.emit import Emit
from moe_fx.devices.ascend.ge import GePass, compile_ge
from moe_fx.devices.ascend.happens_before import races
from moe_fx.devices.ascend.lowerings import LOWERINGS, is_swiglu, swiglu
from moe_fx.devices.ascend.streams import LABEL, StreamOps, use_streams
from moe_fx.errors import ConfigurationError
from moe_fx.options import Options
from moe_fx.passes.lower.lower import lower
from moe_fx.region import Lowered
from moe_fx.report import Report

log = logging.getLogger("moe_fx")

EAGER = ("eager", "aot_eager")


def compile_lowered(
    module: GraphModule, inputs: Sequence[Any], options: Options, report: Report
) -> Callable[..., Any]:
    """``module`` compiled by ``options.base``; a graph without dialect ops as it is.

    Raises `ConfigurationError` for a base that no lowering is for.
    """
    own = device_pass(options, report)
    if options.base == "npugraph_ex":
        return _npugraph_ex(module, inputs, own, options, report)
    if options.base == "torchair":
        return compile_ge(module, inputs, own, options)
    if options.base_options:
        raise ConfigurationError(f"base_options: base={options.base!r} takes none")
    return aot_eager_compiler(own)(module, list(inputs))


def device_pass(options: Options, report: Report) -> DevicePass:
    """What ``options.base`` is to call on each graph that it runs. Raises `ConfigurationError` for
    a base that no lowering is for."""
    passes: dict[str, Callable[[Options, Report], DevicePass]]
    passes = {"npugraph_ex": NpuGraphPass, "torchair": GePass, **dict.fromkeys(EAGER, EagerPass)}
    if options.base not in passes:
        raise ConfigurationError(
            f"There is no lowering to NPU ops for base={options.base!r}. Use base='npugraph_ex', "
            "'torchair' or 'aot_eager', or lower='off' for ATen calls."
        )
    return passes[options.base](options, report)


class EagerPass(DevicePass):
    """Exchanges stay asynchronous, as torch.distributed has them."""

    def _lower(self, graph: Graph) -> list[Lowered]:
        return lower(graph, Emit, LOWERINGS, {is_swiglu: swiglu})


class NpuGraphPass(DevicePass):
    """For npugraph_ex's ``post_grad_custom_pre_pass``: exchanges run on a stream of their own.
    Raises `RuntimeError` if that left an edge between streams unordered."""

    def _lower(self, graph: Graph) -> list[Lowered]:
        done = lower(graph, Emit, LOWERINGS, {is_swiglu: swiglu})
        done += use_streams(graph, stream_ops(self.options))
        check_order(graph)
        return done


def stream_ops(options: Options) -> StreamOps:
    npu.npugraph_ex()
    own = torch.ops.npugraph_ex
    return StreamOps(
        own.scope_enter.default,
        own.scope_exit.default,
        (npu.create_event, own.tagged_event_record.default, own.tagged_event_wait.default),
        options.exchange_cores,
    )


def check_order(graph: Graph) -> None:
    """Of our stream; a user's own streams are the user's."""
    found = [race for race in races(graph) if LABEL in (race.writer_stream, race.reader_stream)]
    if found:
        raise RuntimeError(
            "moe_fx: the graph for the NPU has unordered edges between streams; this is a bug, "
            f"please report it with the graph: {'; '.join(map(str, found))}"
        )


def _npugraph_ex(
    module: GraphModule, inputs: Sequence[Any], own: DevicePass, options: Options, report: Report
) -> Callable[..., Any]:
    compiler = npu.npugraph_ex_compiler()
    settings = own.among(options.base_options)
    if any(plan.host_sync for plan in report.plans):
        log.warning(
            "base='npugraph_ex' runs this graph op by op and does not capture it: %s. Strategies "
            "without a host sync: strategy='mc2', 'allgather' or 'padded_alltoall'.",
            next(plan.capture for plan in report.plans if plan.host_sync),
        )
        settings["force_eager"] = True
    return compiler(module, list(inputs), options=settings)
