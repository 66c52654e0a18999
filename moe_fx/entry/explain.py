"""``moe_fx.explain``: what the passes see in a model, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import moe_fx.passes as passes
from moe_fx.capture.bodies import open_bodies
from moe_fx.capture.capture import NotFunctional, capture
from moe_fx.capture.local_tensors import localise
from moe_fx.devices import device_for
from moe_fx.entry.ambient import neutral
from moe_fx.entry.backend import is_training
from moe_fx.entry.net import log_report, net
from moe_fx.entry.tracing import Seen, captured_in_vain, note_breaks, outside, sees_frames
from moe_fx.graph.selectors import may_select_experts
from moe_fx.options import Options, parse_options
from moe_fx.region import Region
from moe_fx.report import Report
from moe_fx.report.naming import name_of


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
    names = {id(p): n for n, p in model.named_parameters()} if isinstance(model, nn.Module) else {}

    def record(module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found = Report()
        larger, tables = False, list[Any]()
        with outside():
            with net(found, module, example_inputs, "it looked for MoE layers"):
                larger, tables = _analyse(module, example_inputs, parsed, found, steps)
            found.expert_parameters = [names[id(t)] for t in tables if id(t) in names]
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
) -> tuple[bool, list[Any]]:
    """Whether a layer was found that needs data-dependent sizes; the inputs that hold one expert a
    row."""
    if not may_select_experts(module):
        report.graphs += 1
        return False, []
    try:
        local = localise(open_bodies(module)[0], example_inputs)
        captured = capture(local.module, local.inputs)
    except NotFunctional as obstacle:
        report.declined.append(obstacle.declined)
        report.graphs += 1
        return False, []
    context = passes.Context(
        options=options,
        report=report,
        group=options.ep_group,
        training=is_training(local.inputs),
        device=device_for(options, local.inputs),
    )
    with neutral():
        passes.run(captured, context, steps)
    tables = [example_inputs[at] for at in _tables_of_experts(context.regions, example_inputs)]
    return context.holds_new_sizes, tables


def _tables_of_experts(regions: Sequence[Region], inputs: Sequence[Any]) -> list[int]:
    """Which inputs the regions' per-expert tensors are made of, and have an expert a row."""
    found: set[int] = set()
    for region in regions:
        pending, seen = list(region.parts.tables), set(region.parts.tables)
        while pending:
            new = [node for node in pending.pop().all_input_nodes if node not in seen]
            seen.update(new)
            pending += new
        placeholders = region.parts.select.graph.find_nodes(op="placeholder")
        for at, (placeholder, value) in enumerate(zip(placeholders, inputs, strict=True)):
            read = placeholder in seen and isinstance(value, Tensor)
            if read and value.shape[:1] == (region.num_experts,):
                found.add(at)
    return sorted(found)
