"""What Dynamo captures of a model that is compiled with moe_fx, and what it says of the rest.

Contract. `install`, called once, stands around Dynamo's conversion of each Python frame, for frames
of a backend that is marked with `sees_frames` alone; others are converted as ever. It does two
things.

*Data-dependent sizes.* A loop over experts holds ``torch.where(ids == e)``, whose size only running
gives, and there Dynamo ends a graph by default. For our frames it is told to go on, while it traces
and no longer: neither the base compiler nor anything else that runs or compiles meanwhile finds
Dynamo's configuration changed. A frame is traced anew, as without moe_fx, where Dynamo gives it up
so, and where nothing came of it (`captured_in_vain`): a graph with such sizes reaches the base
compiler only if a layer was rewritten for which they were needed.

*Breaks.* What Dynamo says where it ends a graph or gives a frame up is kept for the report of the
next graph (`note_breaks`), with the selections of experts that the break parts from their experts.

``torch.compile`` offers no other way: it hides ``backend_ctx_ctor`` of a backend, and that would
hold for all that a call runs, for other backends too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal, TypeVar

from torch._dynamo import config
from torch.fx import Graph, GraphModule

from moe_fx.compat import (
    BREAKS,
    BackendFailed,
    CaptureAgain,
    compile_options,
    cut_by_ddp,
    intercept_frames,
    new_sizes,
    resumes,
)
from moe_fx.entry.strict import refuse_missed, refuse_model
from moe_fx.errors import NothingMatched
from moe_fx.passes.recognise.recognise import AT_BREAK, LEAVES
from moe_fx.region import Break, Declined
from moe_fx.report import Report
from moe_fx.report.breaks import DDP_CUTS, broken, cut, given_up, joined

__all__ = [
    "Seen",
    "captured_in_vain",
    "install",
    "note_breaks",
    "outside",
    "seen_whole",
    "sees_frames",
]

log = logging.getLogger("moe_fx")

_SIZES = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
_MARK = "_moe_fx_sees_frames"
_SEEN = "_moe_fx_seen"
_RESUMED = "torch_dynamo_resume_in_"
_Backend = TypeVar("_Backend", bound=Callable[..., Any])


@dataclass
class Seen:
    """Of one compiled model, over all its graphs. root: its outermost function. unsaid: what no
    graph's report has said yet. said: layers and breaks of those that have. warned: what
    was written to the log. silent: nothing is, for who asks reads the report."""

    root: CodeType | None = None
    unsaid: Report = field(default_factory=Report)
    said: Report = field(default_factory=Report)
    warned: set[str] = field(default_factory=set)
    silent: bool = False


@dataclass
class Frame:
    """A Python frame that Dynamo is converting. before: of Dynamo's configuration, what is changed
    while it traces; None where nothing is. obstacle: why it was given up with data-dependent sizes.
    declined: the candidates in the graph that had such sizes in vain."""

    seen: Seen
    code: CodeType
    by_ddp: bool
    before: dict[str, Any] | None = None
    obstacle: Break | None = None
    declined: list[Declined] = field(default_factory=list)


_current: ContextVar[Frame | None] = ContextVar("moe_fx_frame", default=None)


def sees_frames(backend: _Backend, seen: Seen | None = None) -> _Backend:
    """Marks a torch.compile backend: `install` is about the frames that are compiled with it.
    seen: for a backend that compiles one model; otherwise each torch.compile has its own."""
    setattr(backend, _MARK, seen or True)
    return backend


def install() -> None:
    intercept_frames(_convert)


@contextmanager
def outside() -> Iterator[None]:
    """Around what a backend does: with Dynamo's configuration as the user has it."""
    frame = _current.get()
    if frame is None or frame.before is None:
        yield
        return
    before = frame.before
    try:
        with config.patch(before):
            yield
    except CaptureAgain:
        frame.before = None
        for name, value in before.items():
            setattr(config, name, value)  # until the frame is done: `_convert` puts back the rest
        raise


def captured_in_vain(module: GraphModule, report: Report) -> None:
    """Raises `CaptureAgain` if ``module`` holds data-dependent sizes only because moe_fx wants
    them. For graphs of which nothing is made that needs them; what ``report`` says of candidates
    is said by the next report."""
    frame = _current.get()
    if frame is not None and frame.before is not None and _holds_new_sizes(module):
        frame.declined = report.declined
        raise CaptureAgain(restart_reason="moe_fx needs no data-dependent sizes here")


def note_breaks(module: GraphModule, report: Report) -> None:
    """Adds to the report of a graph where and why Dynamo ended it, and what was not said before."""
    frame = _current.get()
    if frame is not None:
        report.extend(frame.seen.unsaid)
        root = frame.seen.root or frame.code
        name = getattr(root, "co_qualname", root.co_name)  # the latter in Python 3.10
        if "/torch/" not in root.co_filename:  # what torch puts around some models
            report.model = report.model or name.removesuffix(".forward")
        frame.seen.unsaid = Report()
        if frame.obstacle is not None and frame.obstacle.hides:
            report.breaks.append(frame.obstacle)
            frame.obstacle = None
    left = tuple(
        dict.fromkeys(
            d.source for d in report.declined if LEAVES in d.reason or AT_BREAK in d.reason
        )
    )
    ended = getattr(module, "compile_subgraph_reason", None)
    if ended is not None and ended.graph_break:
        if frame is not None and frame.by_ddp and DDP_CUTS in ended.reason:
            report.breaks = joined([*report.breaks, cut(frame.code, left)])
        else:
            report.breaks.append(broken(ended.reason, ended.user_stack, left))
    if frame is not None:
        _tell_more(report, frame)


def _tell_more(report: Report, frame: Frame) -> None:
    """Where a layer leaves the graph, the reason for which it was not found when the graph went on
    with data-dependent sizes says more."""
    if frame.declined and any(LEAVES in each.reason for each in report.declined):
        here = [each for each in report.declined if LEAVES not in each.reason]
        report.declined = [*here, *frame.declined]


def seen_whole(module: GraphModule, report: Report) -> Report | None:
    """Takes note of the report of a graph; the layers and breaks of all graphs of the model, if its
    outermost function ends with this one."""
    frame = _current.get()
    if frame is None:
        return report
    frame.seen.said.extend(Report(regions=report.regions, breaks=report.breaks))
    ended = getattr(module, "compile_subgraph_reason", None)
    if ended is None or ended.graph_break or not _is_root(frame):
        return None
    return frame.seen.said


def _convert(backend: Any, fullgraph: bool, code: CodeType, go_on: Callable[[], Any]) -> Any:
    pieces_go_to = cut_by_ddp(backend)
    owner = backend if pieces_go_to is None else pieces_go_to
    mark = _mark_of(owner)
    if mark is None:
        with outside():
            return _within(None, go_on)
    seen: Seen = mark if isinstance(mark, Seen) else vars(owner).setdefault(_SEEN, Seen())
    if seen.root is None:
        seen.root = code
    frame = Frame(seen, code, by_ddp=pieces_go_to is not None)
    if not fullgraph and not frame.by_ddp and not all(getattr(config, n) for n in _SIZES):
        frame.before = {name: getattr(config, name) for name in _SIZES}
        try:
            with config.patch(dict.fromkeys(_SIZES, True)):
                result = _within(frame, go_on)
            _end_of_model(frame, owner, result)
            return result
        except (BackendFailed, NothingMatched):
            raise  # the backend has its own ways out
        except Exception as error:
            if frame.before is None:  # it had been traced anew already
                if isinstance(error, BREAKS):
                    _note(given_up(error), frame, owner)
                raise
            log.info("Traced anew, without data-dependent sizes: %s", error)
            frame.before = None
            frame.obstacle = given_up(error) if isinstance(error, BREAKS) else None
    try:
        result = _within(frame, go_on)
    except BREAKS as error:
        _note(frame.obstacle or given_up(error), frame, owner)
        raise
    _end_of_model(frame, owner, result)
    return result


def _end_of_model(frame: Frame, owner: Any, converted: Any) -> None:
    """The outermost function may end with what is no graph, or with a break."""
    if _is_root(frame) and not resumes(converted) and _is_strict(owner):
        refuse_model(frame.seen.said)


def _within(frame: Frame | None, go_on: Callable[[], Any]) -> Any:
    token = _current.set(frame)
    try:
        return go_on()
    finally:
        _current.reset(token)


def _note(found: Break, frame: Frame, owner: Any) -> None:
    """A function was given up: the next report says so; and at once, for there may be none, whoever
    compiles is told if that hides a layer."""
    report = Report(breaks=[found], declined=frame.declined)
    frame.seen.unsaid.extend(report)
    missed = [f"{d.reason} (at {d.source})" for d in report.missed]
    if found.hides:
        layer = f"the layer whose experts are selected at {' and '.join(found.hides)}"
        said = f"Dynamo gives up the function around it: {found.reason} (at {found.source})"
        missed.append(f"{layer}: {said} {found.advice}".strip())
    if not missed:
        return
    if _is_strict(owner):
        refuse_missed(report)
        refuse_model(report)
    for each in missed:
        if not frame.seen.silent and each not in frame.seen.warned:
            frame.seen.warned.add(each)
            log.warning("An MoE layer may have been missed: %s", each)


_INNER = ("_torchdynamo_orig_backend", "compiler_fn", "func", "__wrapped__")
"""Attributes of what torch, functools.partial and decorators put around a backend."""


def _mark_of(backend: Any) -> Seen | Literal[True] | None:
    """What `sees_frames` left on a backend, however it is wrapped; None for another's."""
    outer: list[Any] = []
    while backend is not None and not any(backend is each for each in outer):
        if hasattr(backend, _MARK):
            return getattr(backend, _MARK)
        outer.append(backend)
        inner = [getattr(backend, name) for name in _INNER if hasattr(backend, name)]
        backend = inner[0] if inner else None
    return None


def _is_root(frame: Frame) -> bool:
    """Whether the frame is the model's outermost function, or what is left of it after a break."""
    root, code = frame.seen.root, frame.code
    if root is None or code is root:
        return True
    resumed = code.co_name.startswith(f"{_RESUMED}{root.co_name}_at_")
    return resumed and code.co_filename == root.co_filename


def _is_strict(owner: Any) -> bool:
    options = compile_options(owner)
    if options is None:
        return False
    return bool(options.get("strict") if isinstance(options, dict) else options.strict)


def _holds_new_sizes(module: GraphModule) -> bool:
    """Whether a size in Dynamo's graph is known only when it runs, and is no input's."""
    for graph in _graphs(module):
        given = new_sizes([n.meta.get("example_value") for n in graph.find_nodes(op="placeholder")])
        if any(new_sizes(node.meta.get("example_value")) - given for node in graph.nodes):
            return True
    return False


def _graphs(module: GraphModule) -> Iterator[Graph]:
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            yield inner.graph
