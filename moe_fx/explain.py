"""``moe_fx.explain``: what the passes see in a model, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import moe_fx.passes as passes
from moe_fx.ambient import neutral
from moe_fx.backend import is_training
from moe_fx.bodies import open_bodies
from moe_fx.capture import NotFunctional, capture
from moe_fx.devices import device_for
from moe_fx.local_tensors import localise
from moe_fx.naming import name_of
from moe_fx.net import log_report, net
from moe_fx.options import Options, parse_options
from moe_fx.passes.selectors import may_select_experts
from moe_fx.report import Report
from moe_fx.tracing import Seen, captured_in_vain, note_breaks, outside, sees_frames


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    dynamic: bool | None = None,
    ranks: int | None = None,
    **kwargs: Any,
) -> Report:
    """Capture ``model(*args, **kwargs)`` and say which MoE layers the backend would rewrite.

    Runs the model once as it is (nothing is compiled; no process group is needed) and returns a
    `Report` with a `Region` per MoE layer and a `Declined` per other candidate, of all graphs that
    the model's capture has. ``dynamic`` as in torch.compile. ``ranks``: plan and verify for so many
    expert-parallel ranks instead of for the group of the options.
    """
    parsed = parse_options(options)
    steps = passes.ANALYSIS if ranks is None else passes.for_ranks(ranks, passes=passes.ANALYSIS)
    report = Report(model=name_of(model))

    def record(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found = Report()
        larger = False
        with outside():
            with net(found, module, example_inputs, "it looked for MoE layers"):
                larger = _analyse(module, example_inputs, parsed, found, steps)
            if found.bugs or not larger:
                captured_in_vain(module, found)
            note_breaks(module, found)
        log_report(found)
        report.extend(found)
        return module.forward

    torch._dynamo.reset()
    seen = Seen(silent=True)
    torch.compile(model, backend=sees_frames(record, seen), dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    report.extend(seen.unsaid)
    return report


def _analyse(
    module: GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    report: Report,
    steps: tuple[passes.Pass, ...],
) -> bool:
    """Whether a layer was found that needs data-dependent sizes."""
    if not may_select_experts(module):
        report.graphs += 1
        return False
    try:
        local = localise(open_bodies(module)[0], example_inputs)
        captured = capture(local.module, local.inputs)
    except NotFunctional as obstacle:
        report.declined.append(obstacle.declined)
        report.graphs += 1
        return False
    context = passes.Context(
        options=options,
        report=report,
        group=options.ep_group,
        training=is_training(local.inputs),
        device=device_for(options, local.inputs),
    )
    with neutral():
        passes.run(captured, context, steps)
    return context.holds_new_sizes
