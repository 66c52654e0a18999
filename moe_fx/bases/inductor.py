"""The order of exchanges and compute, kept through the base compiler.

Inductor cuts a training graph in two and rewrites both; so `passes/overlap/overlap.py` orders its
forward and backward graphs where Inductor hands them to custom passes. What it finds is pinned by
dependencies, which Inductor's own reordering and fusing then respect. There too the gradients that
chunks have of the same weights become one (`passes/overlap/sum_gradients.py`), in their parameters'
layout (`passes/overlap/gradient_layout.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from moe_fx.compat import (
    CustomGraphPass,
    base_compiler,
    inductor_cuda_graphs,
    inductor_mode,
    inductor_passes,
    known_backends,
)
from moe_fx.errors import ConfigurationError
from moe_fx.options import Options
from moe_fx.passes.overlap.gradient_layout import lay_out_gradients
from moe_fx.passes.overlap.overlap import overlap
from moe_fx.passes.overlap.sum_gradients import sum_gradients
from moe_fx.plan import ExchangePlan
from moe_fx.report import Report
from moe_fx.sources import SOURCES
from moe_fx.suggest import did_you_mean

log = logging.getLogger("moe_fx")


class OrderPass(CustomGraphPass):
    """Gives one graph the gradients that it should have, in place, and orders it. memory: how much
    more the order may take; None: the order stays."""

    def __init__(self, memory: float | None) -> None:
        self.memory = memory

    def __call__(self, graph: Graph) -> None:
        sum_gradients(graph)
        lay_out_gradients(graph)
        if self.memory is not None:
            overlap(graph, self.memory, pinned=True)

    def uuid(self) -> str:
        return f"moe_fx.OrderPass {SOURCES} {torch.__version__} {self.memory}"


def beside(base_options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``base_options`` and what moe_fx sets of them itself. Raises `ConfigurationError` if the user
    has set the same."""
    both = sorted(set(base_options) & set(own))
    if both:
        raise ConfigurationError(
            f"base_options: moe_fx sets {', '.join(both)} itself. Leave them out; for a pass of "
            "your own use another hook of the compiler, or compile with it directly and call "
            "moe_fx.MoEPass from your hook."
        )
    return {**base_options, **own}


def require_base(base: str) -> None:
    """Raise `ConfigurationError` unless torch.compile has a backend of that name."""
    if base not in (known := known_backends()):
        raise ConfigurationError(
            f"base: torch.compile has no backend {base!r}. {did_you_mean(base, known)}Some that it "
            "has are inductor, aot_eager and eager; torch._dynamo.list_backends(None) lists them "
            "all."
        )


def compile_by_base(
    module: GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    training: bool,
) -> Callable[..., Any]:
    """``module``, in which the report's plans were carried out, compiled by ``options.base``. If
    that calls `OrderPass`, gradients become what they should be and exchanges run beside compute.
    Raises `ConfigurationError` if there is no such compiler."""
    require_base(options.base)
    compiler = base_compiler(options.base)
    if options.base != "inductor":
        given = {"options": dict(options.base_options)} if options.base_options else {}
        return compiler(module, list(inputs), **given)
    patches = inductor_mode(options.mode) | beside(
        options.base_options, _own_settings(options, report.plans, training)
    )
    sync = next((plan.capture for plan in report.plans if plan.host_sync), "")
    if sync and patches.get("triton.cudagraphs", inductor_cuda_graphs()):
        note = f"CUDA graphs are off for this graph: it is {sync}"
        log.warning("%s. Strategies without a host sync: docs/limits.md", note)
        report.notes.append(note)
        patches["triton.cudagraphs"] = False
    return compiler(module, list(inputs), **({"config_patches": patches} if patches else {}))


def _own_settings(
    options: Options, plans: Sequence[ExchangePlan], training: bool
) -> dict[str, Any]:
    overlaps = options.overlap != "off" and any(plan.exchanges for plan in plans)
    if not (overlaps or (plans and training)):
        return {}
    memory = options.overlap_memory if overlaps else None
    own: dict[str, Any] = {"post_grad_custom_pre_pass": inductor_passes(OrderPass(memory))}
    if overlaps:
        # The first would start each exchange where it is waited for, the second do the filling
        # before anything is started.
        own |= {"reorder_for_locality": False, "reorder_for_peak_memory": False}
    return own
