"""What runs on a rank of the NPU suite: models on CPU tensors through reference kernels, and on the
fake device through torch_npu's own compilers."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from moe_fx import compat
from moe_fx.devices.ascend import npu, reference
from moe_fx.devices.ascend.compile import NpuGraphPass
from moe_fx.devices.ascend.device_pass import DevicePass
from moe_fx.devices.ascend.ge import GePass
from moe_fx.devices.ascend.happens_before import races
from moe_fx.ranks import agree, presence
from moe_fx.report import Report
from moe_fx.testing import RankPool
from tests.dispatcher.test_captured import TOP_K, layer, tokens
from tests.models import build, token_ids

LOWERED = {"eager": None, "npugraph_ex": NpuGraphPass, "torchair": GePass}
T = TypeVar("T")
Case = tuple[nn.Module, Callable[[int, int], dict[str, Any]]]


def case(
    kind: str,
    dtype: torch.dtype,
    dynamic: bool,
    group: dist.ProcessGroup | None = None,
    **fields: Any,
) -> Case:
    """(module, inputs for (rank, number of tokens)). group: the dispatcher's, if not the world."""
    if kind == "dispatcher":
        module: nn.Module = layer(dist.get_rank(), group=group)
        return module.to(dtype), lambda rank, count: {"x": tokens(rank, count).to(dtype)}
    model, config = build(kind, "grouped_mm", dtype, **fields)
    if dynamic:
        model.set_attn_implementation("eager")  # torch_npu's other one specialises on the length

    def inputs(rank: int, count: int) -> dict[str, Any]:
        return {"input_ids": token_ids(config, 1, count, seed=rank), "use_cache": False}

    return model, inputs


@dataclass
class Compared:
    errors: list[float]
    gradient_errors: dict[str, float]
    lowered: list[tuple[str, tuple[str, ...], str]]
    plans: list[str]
    declined: list[str]
    graphs: int
    sent: list[str] = field(default_factory=list)


def compared(
    rank: int,
    kind: str,
    target: str,
    counts: Sequence[Sequence[int]],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    gradients: bool = False,
    fields: dict[str, Any] | None = None,
) -> Compared:
    """Eager on CPU against compiled, lowered for ``target`` and run by reference kernels; after the
    first of ``counts[rank]`` the number of tokens is dynamic."""
    prepare()
    torch.set_grad_enabled(gradients)
    dynamic = len(counts[rank]) > 1
    module, inputs = case(kind, dtype, dynamic, **(fields or {}))
    reports: list[Report] = []
    found = Compared([], {}, [], [], [], 0)
    graphs: list[GraphModule] = []
    settings = {"base": "aot_eager", "lower": "npu", **options}
    compiled = _compiled(module, kind, dist.group.WORLD, reports, settings)
    with _lowered_for(target, graphs):
        for count in counts[rank]:
            given = inputs(rank, count)
            if dynamic:
                _mark_dynamic(kind, given)
            expected, got = _result(module(**given)), _result(compiled(**given))
            found.errors.append(_relative(got, expected))
            if gradients:
                found.gradient_errors |= _gradient_errors(module, expected, got)
    found.graphs = len(reports)
    for report in reports:
        found.lowered += [(each.op, each.to, each.kept) for each in report.lowered]
        found.plans += [plan.summary for plan in report.plans]
        found.declined += [declined.reason for declined in report.declined]
    found.sent = [str(n.target) for graph in graphs for n in graph.graph.nodes]
    return found


def _mark_dynamic(kind: str, given: dict[str, Any]) -> None:
    leaf, dim = (given["x"], 0) if kind == "dispatcher" else (given["input_ids"], 1)
    torch._dynamo.mark_dynamic(leaf, dim)


def prepare() -> None:
    npu.torchair()
    npu.npugraph_ex()
    reference.register()
    torch._dynamo.reset()


@contextmanager
def _lowered_for(target: str, graphs: list[GraphModule]) -> Iterator[None]:
    """Whatever the compiler asks for, what ``target`` would run."""
    from moe_fx.devices.ascend import compile as compilation

    kind = LOWERED[target]
    before = compilation.device_pass

    def device_pass(options: Any, report: Report) -> DevicePass:
        own = before(options, report) if kind is None else kind(options, report)

        def call(module: GraphModule, *others: Any) -> None:
            own(module)
            graphs.append(module)

        return call  # type: ignore[return-value]

    compilation.device_pass = device_pass
    try:
        yield
    finally:
        compilation.device_pass = before


def _result(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def _gradient_errors(module: nn.Module, expected: Tensor, got: Tensor) -> dict[str, float]:
    """Of all that is not per expert: experts' gradients are summed over the ranks."""
    names, leaves = zip(*module.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected.square().mean(), leaves, allow_unused=True)
    found = torch.autograd.grad(got.square().mean(), leaves, allow_unused=True)
    return {
        name: _relative(mine, theirs)
        for name, theirs, mine in zip(names, wanted, found, strict=True)
        if theirs is not None and theirs.dim() < 3
    }


# -- on the fake device ----------------------------------------------------------------------------


@dataclass
class Launched:
    """trace: what was launched, (name, stream, event) each; graphs: code of the graphs that ran."""

    trace: list[tuple[str, str, str]]
    lowered: list[tuple[str, tuple[str, ...], str]]
    plans: list[Any]
    declined: list[str]
    races: list[str]
    unnoticed: list[str]
    nodes: list[str]
    unbacked: list[str]
    replayed: bool


def on_device(pool: RankPool, run: Callable[..., T], *args: Any, **fields: Any) -> T:
    """``run(group, ...)`` on rank 0, in a group of HCCL: the fake device moves no rows, so that the
    other rank would do the same once more. It only agrees, whatever is asked."""
    found = pool.run(partial(_first, run, **fields), *args)[0]
    assert found is not None
    return found


def _first(run: Callable[..., T], rank: int, *args: Any, **fields: Any) -> T | None:
    group = dist.new_group(backend="hccl")
    assert group is not None
    if rank > 0:
        compat.group_store(group).set(presence.store_key(group, f"link/npu/{rank}"), "here")
        return None
    own = agree._key
    with mock.patch.object(agree, "_key", lambda group, _, *what: own(group, 0, *what)):
        return run(group, *args, **fields)


def launched(
    group: dist.ProcessGroup,
    kind: str,
    count: int,
    dynamic: bool,
    options: dict[str, Any],
    **fields: Any,
) -> Launched:
    """Compile, capture and replay on ``npu:0`` with npugraph_ex."""
    # npugraph_ex's own in-place pass breaks transformers' masks: x[1:] - x[:-1].
    settings = {"base": "npugraph_ex", "base_options": {"inplace_pass": False}, **options}
    compiled, given, reports = _on_device(group, kind, count, dynamic, dynamic, settings, fields)
    with _sizes(count * TOP_K), final_graphs() as finals:
        with _launches() as lines:
            compiled(**given)
        with _launches() as again:
            compiled(**given)
    report = reports[0]
    nodes = [node for graph in finals for node in graph.nodes]
    return Launched(
        _parsed(lines),
        [(each.op, each.to, each.kept) for each in report.lowered],
        report.plans,
        [declined.reason for declined in report.declined],
        [str(race) for graph in finals for race in races(graph)],
        [missed for graph in finals for missed in _unnoticed(graph)],
        [str(node.target) for node in nodes],
        [node.name for node in nodes if "unbacked_bindings" in node.meta],
        any("aclmdlRIExecuteAsync" in line for line in again),
    )


def _on_device(
    group: dist.ProcessGroup,
    kind: str,
    count: int,
    dynamic: bool,
    plain_attention: bool,
    options: dict[str, Any],
    fields: dict[str, Any],
) -> tuple[Callable[..., Any], dict[str, Any], list[Report]]:
    """(the compiled module, what to call it with, where its reports go) on ``npu:0``."""
    prepare()
    torch.set_grad_enabled(False)
    module, inputs = case(kind, torch.bfloat16, plain_attention, group, **fields)
    given = {k: moved(v) for k, v in inputs(0, count).items()}
    if dynamic:
        _mark_dynamic(kind, given)
    reports: list[Report] = []
    return _compiled(module.npu(), kind, group, reports, options), given, reports


def _compiled(
    module: nn.Module, kind: str, group: Any, reports: list[Report], options: dict[str, Any]
) -> Callable[..., Any]:
    """The dispatcher brings its group itself."""
    own = {"ep_group": None if kind == "dispatcher" else group, "on_report": reports.append}
    return torch.compile(module, backend="moe_fx", fullgraph=True, options={**own, **options})


def _unnoticed(graph: Graph) -> list[str]:
    """Joins of the main stream with an exchange that could be taken out without a race found."""
    found = []
    for node in list(graph.nodes):
        if _is_join(node) and not _joined_again(node):
            place, args = node.next, node.args
            graph.erase_node(node)
            if not races(graph):
                found.append(str(args[0]))
            with graph.inserting_before(place):
                graph.call_function(torch.ops.npugraph_ex.tagged_event_wait.default, args)
    return found


def _joined_again(node: Node) -> bool:
    """Before anything is computed: a later exchange of the stream is behind this one."""
    after = node.next
    while after.target is torch.ops.moe_fx.keep.default or _is_join(after):
        if _is_join(after):
            return True
        after = after.next
    return False


def _is_join(node: Node) -> bool:
    waits = node.target is torch.ops.npugraph_ex.tagged_event_wait.default
    return waits and str(node.args[0]).startswith("moe_fx") and "arrived" in str(node.args[0])


@contextmanager
def _sizes(pairs: int) -> Iterator[None]:
    """The host reads sizes that could be, not what a device that computes nothing left: ``pairs``
    sent and as many received."""

    def split_sizes(counts: Tensor, recv_counts: Tensor, chunks: int = 1) -> Tensor:
        each, rest = divmod(pairs, chunks * len(recv_counts))
        sizes = torch.full((chunks, 2, len(recv_counts)), each)
        sizes[0, :, 0] += rest
        return sizes

    library = torch.library.Library("moe_fx", "IMPL", "PrivateUse1")
    library.impl("split_sizes", split_sizes)
    try:
        yield
    finally:
        library._destroy()


def moved(value: Any) -> Any:
    return value.npu() if isinstance(value, Tensor) else value


@contextmanager
def final_graphs() -> Iterator[list[Any]]:
    """The graphs that npugraph_ex makes code of, after all of its passes."""
    from npugraph_ex._acl_concrete_graph import fx2acl_converter

    kind = fx2acl_converter.AclConcreteGraph
    before = kind.optimize_graph_without_runtime
    found: list[Any] = []

    def optimize(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, *args, **kwargs)
        found.append(self.fx_graph.graph)
        return result

    kind.optimize_graph_without_runtime = optimize
    try:
        yield found
    finally:
        kind.optimize_graph_without_runtime = before


@contextmanager
def _launches() -> Iterator[list[str]]:
    """The lines that the stand-ins print."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        os.environ["CANN_SHIM_OPTRACE"] = "1"
        try:
            yield lines
        finally:
            del os.environ["CANN_SHIM_OPTRACE"]
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += [line for line in file if line.startswith("[op]")]


_LINE = re.compile(r"\[op\] (\w+)\s+stream=(\S+)(?: event=(\S+))?")


def _parsed(lines: Sequence[str]) -> list[tuple[str, str, str]]:
    return [match.groups("") for line in lines if (match := _LINE.match(line))]  # type: ignore[misc]


# -- torchair --------------------------------------------------------------------------------------


@dataclass
class Converted:
    """ops: `ATTRIBUTES` of each op of the GE graphs, in order."""

    ops: list[tuple[str, ...]]
    plans: list[str]
    declined: list[str]
    error: str


def converted(
    group: dist.ProcessGroup,
    kind: str,
    count: int,
    dynamic: bool,
    options: dict[str, Any],
    **fields: Any,
) -> Converted:
    """What torchair makes of a model; it can't be run without GE."""
    settings = {"base": "torchair", **options}
    compiled, given, reports = _on_device(group, kind, count, dynamic, True, settings, fields)
    error = ""
    with ge_graphs() as graphs:
        try:
            compiled(**given)
        except RuntimeError as failure:  # GE is not there to run the graph
            error = str(failure)
    return Converted(
        [tuple(_attribute(op, name) for name in ATTRIBUTES) for op in graphs],
        [plan.summary for report in reports for plan in report.plans],
        [declined.reason for report in reports for declined in report.declined],
        error,
    )


ATTRIBUTES = ("type", "_user_stream_label", "group", "_op_aicore_num", "_op_vectorcore_num")


def _attribute(op: Any, name: str) -> str:
    if name == "type":
        return str(op.type)
    return op.attr[name].s.decode() if name in op.attr else ""


@contextmanager
def ge_graphs() -> Iterator[list[Any]]:
    """The ops of the GE graphs that torchair makes."""
    from torchair import npu_fx_compiler

    kind = npu_fx_compiler._NpuFxCompiler
    before = kind._gen_compiled_gm
    found: list[Any] = []

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph = before(self, *args, **kwargs)
        found.extend(graph.graph.op)
        return graph

    kind._gen_compiled_gm = generate
    try:
        yield found
    finally:
        kind._gen_compiled_gm = before
