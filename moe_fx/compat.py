"""Every private torch import of the project, so that a torch release breaks one file.

Which releases it was run on: `moe_fx.supported`.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import CodeType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the gradients of its ops
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import compiled_autograd, convert_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import BackendCompilerFailed as BackendFailed
from torch._dynamo.exc import (
    RestartAnalysis,
    SkipFrame,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
    Unsupported,
    UserError,
)
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_export_module, make_boxed_func
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import CompileContext, detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._library.fake_impl import allocate_size
from torch._logging import trace_structured
from torch._ops import OpOverload, OpOverloadPacket, _get_dispatch_mode_pre_dispatch
from torch._subclasses import FakeTensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.distributed.distributed_c10d import (
    _find_or_create_pg_by_ranks_and_tag,
    _get_group_tag,
    _resolve_process_group,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
)
from torch.fx.experimental.symbolic_shapes import (
    compute_unbacked_bindings,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.fx.node import map_arg
from torch.library import get_ctx
from torch.overrides import _len_torch_function_stack, _pop_mode, _push_mode
from torch.types import py_sym_types
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _CachingTorchDispatchMode as SelectiveForward

__all__ = [
    "AUTOGRAD_COLLECTIVES",
    "BREAKS",
    "DYNAMO_SIGNALS",
    "GIVE_OTHER_STORAGE",
    "INFERENCE_MODE",
    "AutocastKey",
    "BackendFailed",
    "CaptureAgain",
    "CustomGraphPass",
    "FakeValues",
    "NoExport",
    "SelectiveForward",
    "abort_group",
    "all_gather_rows",
    "aot_eager_compiler",
    "assert_on_device",
    "autocast_devices",
    "autocast_key",
    "autocast_off",
    "base_compiler",
    "collective_groups",
    "compile_id",
    "compile_options",
    "cut_by_ddp",
    "data_dependent_size",
    "decomposed",
    "enter_autocast",
    "exchange_equal_rows",
    "exit_autocast",
    "export_functional",
    "fake_with_numbers",
    "forgetting_new_sizes",
    "frame_graph",
    "graph_breaks",
    "group_of_ranks",
    "group_store",
    "group_tag",
    "group_timeout",
    "in_backward",
    "in_compiled_autograd",
    "inductor_cuda_graphs",
    "inductor_mode",
    "inductor_passes",
    "intercept_frames",
    "is_traceable_wrapper_subclass",
    "is_traced",
    "known_backends",
    "launch_within",
    "new_sizes",
    "no_compiled_autograd",
    "no_function_modes",
    "no_transforms",
    "number",
    "real_tensors",
    "reduce_scatter_rows",
    "resolve_group",
    "resumes",
    "saved_tensor_hooks_active",
    "set_deterministic",
    "statically_known_true",
    "symbols",
    "trace_artefact",
    "traced",
    "traces_a_body",
    "upper_bound",
]


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group registered under ``name`` (``ProcessGroup.group_name``)."""
    return _resolve_process_group(cast(Any, name))


def group_tag(group: dist.ProcessGroup) -> str:
    """With its ranks, what names a group in collectives that take both."""
    return _get_group_tag(group)


def group_of_ranks(tag: str, ranks: list[int]) -> dist.ProcessGroup:
    """The group of a tag (`group_tag`) and its ranks."""
    return _find_or_create_pg_by_ranks_and_tag(tag, ranks, len(ranks))


def data_dependent_size(least: int = 0) -> SymInt | int:
    """A fresh unbacked size, from within a fake kernel.

    Not ``get_ctx().new_dynamic_size()``: that refuses unless Dynamo was told to capture ops with
    data-dependent shapes, which ``torch.compile`` does only under ``fullgraph=True``. The model's
    own graph has no such op; ours are put in later.
    """
    return allocate_size(get_ctx()._shape_env, min_val=least)


GIVE_OTHER_STORAGE: frozenset[Any] = frozenset(
    (torch.Tensor.set_, "set_", getattr(torch.ops.aten, "shallow_copy_data_", None))
)
"""What Dynamo writes for ``parameter.data = other``: the last from torch 2.14 on."""


class NoExport(Exception):
    """AOT refuses to export a graph; says why."""


_REFUSED = "you are trying to export"


def export_functional(module: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, Any]:
    """(functional ATen graph before decomposition and autograd, its signature). Raises `NoExport`
    for what AOT compiles but does not export."""
    try:
        exported, signature = aot_export_module(
            module, list(inputs), trace_joint=False, pre_dispatch=True, decompositions={}
        )
    except RuntimeError as error:
        refusal = next((line for line in str(error).splitlines() if _REFUSED in line), None)
        if refusal is None:
            raise
        raise NoExport(refusal.strip()) from error
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


def compile_id() -> str:
    """The graph that is being compiled, as torch's logs call it: ``frame/compilation``; "" if
    none is."""
    current = CompileContext.current_compile_id()
    return "" if current is None else str(current)


def trace_artefact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Into torch's structured trace (``TORCH_TRACE``, which tlparse reads); ``payload`` is called
    only if somebody takes one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )


def assert_on_device(condition: Tensor, message: str) -> None:
    """Checked where ``condition`` is computed, when it is: the host does not wait."""
    torch._assert_async(condition, message)


def is_traced() -> bool:
    """Whether ops are being recorded into a graph."""
    return get_proxy_mode() is not None


@torch.compiler.assume_constant_result
def traces_a_body() -> bool:
    """Whether Dynamo, which is tracing the caller, is within the body of a higher-order op, where
    no object from outside may be changed."""
    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


def base_compiler(name: str) -> Callable[..., Callable[..., Any]]:
    """The torch.compile backend called ``name``."""
    return lookup_backend(name)


def known_backends() -> list[str]:
    """The names that `base_compiler` takes, but for moe_fx itself."""
    return [name for name in list_backends(exclude_tags=()) if name != "moe_fx"]


def aot_eager_compiler(own: Callable[[GraphModule], None]) -> Callable[..., Callable[..., Any]]:
    """A torch.compile backend that differentiates, hands each graph to ``own``, and runs it."""

    def run(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        own(module)
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=run, bw_compiler=run)


def inductor_passes(own: CustomGraphPass) -> Any:
    """For Inductor's ``post_grad_custom_pre_pass``: what is set there already, and then ``own``."""
    from torch._inductor import config  # slow to import

    present = config.post_grad_custom_pre_pass
    if present is None:
        return own
    return [*(present if isinstance(present, (list, tuple)) else [present]), own]


def inductor_mode(mode: str | None) -> dict[str, Any]:
    """The settings that torch.compile's ``mode`` stands for. Raises `RuntimeError`, naming the
    modes, for one that Inductor does not have."""
    from torch._inductor import list_mode_options

    return {} if mode is None else dict(list_mode_options(mode))


def inductor_cuda_graphs() -> bool:
    """Whether Inductor makes CUDA graphs unless told otherwise."""
    from torch._inductor import config  # slow to import

    return config.triton.cudagraphs


def let_outputs_have_own_strides(graph: Graph, node: Node) -> None:
    """Inductor copies an output of a backward graph to the strides that it had when the graph was
    handed over: ``node`` is to be returned as it is."""
    (output,) = graph.find_nodes(op="output")
    strides = output.meta.get("original_output_strides")
    returned: Any = output.args[0]
    for at, each in enumerate(returned):
        if each is node and strides is not None:
            strides[at] = node.meta["val"].stride()


DYNAMO_SIGNALS = (RestartAnalysis, SkipFrame)
"""Exceptions by which what a backend calls asks Dynamo for something: no failures."""


BREAKS = (Unsupported, UserError)
"""Exceptions with which Dynamo gives a frame up: it runs as it is."""


class CaptureAgain(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """Raised by a backend: Dynamo is to trace the frame once more, from its start. (The first base
    is let through by whatever calls the backend, the second makes Dynamo forget its breaks.)"""


Frames = Callable[[Any, bool, CodeType, Callable[[], Any]], Any]


def intercept_frames(handler: Frames) -> None:
    """From now on ``handler(backend, fullgraph, code, go_on)`` gives what Dynamo makes of a frame,
    for whichever backend; ``go_on()`` does what Dynamo would have done."""
    convert = convert_frame._compile
    named = inspect.signature(convert)

    @functools.wraps(convert)
    def _compile(*args: Any, **kwargs: Any) -> Any:
        given = named.bind(*args, **kwargs).arguments

        def go_on() -> Any:
            return convert(*args, **{**kwargs, "skip": kwargs.get("skip", 0) + 3})

        return handler(given["compiler_fn"], given["one_graph"], given["code"], go_on)

    convert_frame._compile = _compile


def resumes(converted: Any) -> bool:
    """Whether a frame, as Dynamo converted it, or gave it up, goes on in frames to come."""
    new = converted.guarded_code
    return new is None or any(name.startswith("__resume_at") for name in new.code.co_names)


def frame_graph(error: BaseException) -> Graph | None:
    """What had been captured of a frame when Dynamo gave it up."""
    output = getattr(error, "_torch_dynamo_tracer_output", None)
    graph = getattr(output, "output_graph_for_cleanup", None)
    return None if graph is None else graph.graph


def compile_options(backend: Any) -> Any:
    """The ``options`` that torch.compile was given with ``backend``."""
    return getattr(backend, "kwargs", {}).get("options")


def cut_by_ddp(backend: Any) -> Any:
    """The backend that DDP's optimiser calls for each piece of a graph, if ``backend`` is it."""
    return getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)


def new_sizes(value: Any) -> set[Any]:
    """The numbers that only running gives among ``value``, which may hold tensors, and sizes."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, *py_sym_types))]
    return set(free_unbacked_symbols(leaves))


def fake_with_numbers(tensor: Tensor, inputs: Sequence[Any]) -> Tensor:
    """What stands for ``tensor``, new to Dynamo, when a graph of ``inputs`` is traced: its
    sizes are numbers, as those of parameters, and not symbols."""
    mode = detect_fake_mode(inputs)
    if mode is None or isinstance(tensor, FakeTensor):
        return tensor
    return mode.from_tensor(tensor, static_shapes=True)


@contextmanager
def forgetting_new_sizes(inputs: Sequence[Any]) -> Iterator[None]:
    """Data-dependent sizes that came into being in a block that failed are forgotten: the next
    trace of graph inputs ``inputs`` would look for them among its own results."""
    mode = detect_fake_mode(inputs)
    sizes = None if mode is None else mode.shape_env
    pending = [] if sizes is None else sizes.pending_fresh_unbacked_symbols
    before = list(pending)
    try:
        yield
    except Exception:
        pending[:] = before
        raise


def collective_groups(graph: Graph) -> Iterator[str]:
    """The names of the groups that collectives of ``graph`` work over."""
    for node in graph.nodes:
        op = node.target
        overload = getattr(op, "default", op) if isinstance(op, OpOverloadPacket) else op
        if isinstance(overload, OpOverload):
            names = [argument.name for argument in overload._schema.arguments]
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            if isinstance(given.get("group_name"), str):
                yield cast(str, given["group_name"])


def group_store(group: dist.ProcessGroup) -> dist.Store:
    """The key-value store the group's ranks share."""
    return group.get_group_store()


all_gather_single: Callable[..., Any] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)
"""What `all_gather_into_tensor` is called from torch 2.13 on."""


Empty = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


def empty_on(device: torch.device) -> Empty:
    """What makes a tensor of that shape and those strides on the current device, which is
    ``device``; as the code that Inductor generates does, at a third of the time that
    ``torch.empty`` takes the host."""
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return cast(Empty, torch._C._dynamo.guards._empty_strided_cuda)  # type: ignore[attr-defined]
    return functools.partial(_empty, device)


def _empty(
    device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def symmetric_bytes(
    size: int, device: torch.device, group: dist.ProcessGroup
) -> tuple[Tensor, list[int]]:
    """So many bytes of this GPU's memory, 0 each, to which the others of the group can write, and
    each rank's address of its own as this one sees it. All ranks call it, with the same size."""
    from torch.distributed import _symmetric_memory as symmetric

    buffer = symmetric.empty(size, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)  # others write as soon as they have the address
    handle = symmetric.rendezvous(buffer, group)
    every = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
    return buffer, [each.data_ptr() for each in every]


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds after which the group's backend for ``device`` gives up a collective; infinite for a
    backend that does not say."""
    own = _own_timeout(group._get_backend(device))
    return math.inf if own is None else own.total_seconds()


def _own_timeout(backend: Any) -> timedelta | None:
    try:
        return cast(timedelta, backend.options._timeout)
    except (AttributeError, RuntimeError):  # not of Gloo or NCCL
        return None


@contextmanager
def launch_within(seconds: float, group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Collectives that are started here fail after ``seconds``, where the group's backend for
    ``device`` is Gloo: otherwise its threads, and the end of the process, would wait as long as the
    group's own timeout."""
    backend = group._get_backend(device)
    own = _own_timeout(backend) if isinstance(backend, dist.ProcessGroupGloo) else None
    if own is None:
        yield
        return
    backend._set_default_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        backend._set_default_timeout(own)


def abort_group(group: dist.ProcessGroup, device: torch.device) -> None:
    """End what the group's backend for ``device`` has under way; the group is of no use after."""
    group._get_backend(device).abort()


def in_backward() -> bool:
    """Whether autograd runs the caller."""
    return torch._C._current_graph_task_id() != -1


def all_gather_rows(shard: Tensor, group_size: int, group_name: str) -> Tensor:
    """``[n, ...]`` on each rank to ``[group_size * n, ...]``, in rank order, waited for.

    The gradient is the reduce-scatter (sum) of the whole tensor's gradients. Traces as
    ``all_gather_into_tensor`` and ``wait_tensor``.
    """
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(
        collectives.all_gather_into_tensor(shard, group_size, group_name)
    )


def reduce_scatter_rows(rows: Tensor, group_size: int, group_name: str) -> Tensor:
    """``[group_size * n, ...]`` on each rank to ``[n, ...]``, the sum of this rank's block; waited
    for. The gradient is the all-gather."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(
        collectives.reduce_scatter_tensor(rows, "sum", group_size, group_name)
    )


def exchange_equal_rows(rows: Tensor, group_size: int, group_name: str) -> Tensor:
    """``[group_size * n, ...]``: block ``r`` goes to rank ``r``; blocks arrive in rank order.
    Waited for. The gradient is the same exchange."""
    sizes = [rows.shape[0] // group_size] * group_size
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(
        collectives.all_to_all_single(rows.contiguous(), sizes, sizes, group_name)
    )


def no_transforms() -> AbstractContextManager[object]:
    """A context outside of the function transforms (``torch.func``) that are being applied."""
    return temporarily_clear_interpreter_stack()


@contextmanager
def no_function_modes() -> Iterator[None]:
    """A context without torch-function modes, of which `torch.set_default_device` is one."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def no_compiled_autograd() -> AbstractContextManager[object]:
    """A context in which a backward pass is not compiled."""
    return compiled_autograd._disable()


def in_compiled_autograd() -> bool:
    """Whether what is being compiled is a backward pass (``compiled_autograd``)."""
    return compiled_autograd.in_compiled_autograd_region


INFERENCE_MODE = (
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)
"""What Dynamo's graph calls where a model enters and leaves `torch.inference_mode`."""


def saved_tensor_hooks_active() -> bool:
    """Whether what autograd saves goes through hooks, as activation checkpointing has it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def set_deterministic(enabled: bool, warn_only: bool) -> None:
    """As `torch.use_deterministic_algorithms`, which sets an option of Inductor's too."""
    torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)


def real_tensors() -> AbstractContextManager[object]:
    """A context in which ops run on real tensors, whatever fake mode a compiler is in."""
    return _disable_current_modes()


class FakeValues:
    """Computes ``meta["val"]`` of nodes added to a graph, under the graph's own fake mode, and
    notes the data-dependent sizes that a node brings into being, as Inductor wants them. Does
    nothing for a graph whose values are not fake."""

    def __init__(self, graph: Graph) -> None:
        self.mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])

    def compute(self, node: Node) -> Any:
        if self.mode is None:
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        with self.mode, enable_python_dispatcher():
            value = node.target(*args, **kwargs)
        node.meta["val"] = value
        bindings = compute_unbacked_bindings(self.mode.shape_env, value)
        if bindings:
            node.meta["unbacked_bindings"] = bindings
        return value


def symbols(sizes: Iterable[Any], unknown: int) -> dict[Any, int]:
    """The free symbols of ``sizes`` and the number each had at capture, ``unknown`` for a
    data-dependent one."""
    found: dict[Any, int] = {}
    for size in sizes:
        if isinstance(size, SymInt):
            env = size.node.shape_env
            known = "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val"
            hints = getattr(env, known)  # the latter in torch 2.11
            for symbol in size.node.expr.free_symbols:
                found[symbol] = int(hints.get(symbol, unknown))
    return found


def traced(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    """``function(*values)``, of fake tensors, as a graph of ATen calls."""
    with enable_python_dispatcher():
        return make_fx(function, tracing_mode="real")(*values)


def upper_bound(size: Any) -> int | None:
    """The most that ``size`` can be, if it is bounded."""
    if not isinstance(size, SymInt):
        return int(size)
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_finite and upper < sys.maxsize - 1 else None


def number(size: Any, values: Mapping[Any, int]) -> int:
    """``size`` with numbers for its symbols (`symbols`)."""
    return int(size.node.expr.subs(values)) if isinstance(size, SymInt) else int(size)


def decomposed(node: Node) -> GraphModule | None:
    """The ops that Inductor decomposes ``node`` into, from its input nodes in order; None if it
    compiles the op as it is. For graphs that have been decomposed already: an op that should not be
    there any more is refused by Inductor, not decomposed."""
    # Slow to import, and for nothing unless Inductor, which has, is calling.
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings

    inputs = node.all_input_nodes
    values = [n.meta.get("val") for n in inputs]
    table = select_decomp_table()
    if node.target not in table or node.target in lowerings:
        return None
    if not all(isinstance(value, Tensor) for value in values):
        return None

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    with enable_python_dispatcher():
        return make_fx(call, table, tracing_mode="real")(*values)


AUTOGRAD_COLLECTIVES: Mapping[OpOverload, OpOverload] = {
    getattr(torch.ops._c10d_functional_autograd, name).default: getattr(
        torch.ops._c10d_functional, name
    ).default
    for name in ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    if hasattr(torch.ops._c10d_functional_autograd, name)
}
"""Collectives that have a name of their own for where they are differentiated (torch 2.11), and the
op that each of them calls, with the same arguments."""

AutocastKey = Any
"""A dispatch key: autocast of one device type."""

enter_autocast, exit_autocast = _enter_autocast, _exit_autocast
"""What Dynamo writes into a graph where a region begins and ends: the second takes what the first
returned."""

_AUTOCAST_KEYS: Sequence[AutocastKey] = sorted(
    (key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast")),
    key=int,
    reverse=True,
)
"""The dispatcher's order: the first is called first."""


def autocast_devices() -> list[str]:
    """The device types that autocast knows."""
    return list(torch._C._autocast_supported_devices())


def autocast_off() -> AbstractContextManager[object]:
    """A context in which autocast is off for every device type."""
    return cast(AbstractContextManager[object], torch._C._DisableAutocast())


def autocast_key(op: OpOverload, tensors: Sequence[Tensor]) -> AutocastKey | None:
    """Which autocast, of those that are on, changes a call of ``op`` with these tensors first."""
    if not torch._C._dispatch_has_kernel(op.name()):
        return None
    there = [torch._C._dispatch_keys(tensor) for tensor in tensors]
    for key in _AUTOCAST_KEYS:
        if (
            not torch._C._dispatch_tls_is_dispatch_key_excluded(key)
            and any(keys.has(key) for keys in there)
            and (key in op.py_kernels or _has_own_kernel(op, key))
        ):
            return key
    return None


def _has_own_kernel(op: OpOverload, key: AutocastKey) -> bool:
    name, key_name = op.name(), key.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        name, key_name
    ) and not torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(name, key_name)


def call_kernel(op: OpOverload, key: AutocastKey, args: Any, kwargs: Any) -> Any:
    """The kernel of ``op`` at ``key``, which calls ``op``, or others, for what is below it."""
    if key in op.py_kernels:
        return op.py_kernels[key](*args, **kwargs)
    return op._op_dk(key, *args, **kwargs)


def in_python(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` without telling torch function modes: a tracer that listens would note
    ``enter_autocast`` instead of entering."""
    with torch._C.DisableTorchFunction():
        return function(*args)


Handler = Callable[
    [OpOverload, Callable[[], Any], AbstractContextManager[Any], tuple[Any, ...], dict[str, Any]],
    Any,
]


def intercept(handler: Handler) -> None:
    """In a functional pre-dispatch trace, until it ends: ``handler(op, go_on, again, args,
    kwargs)`` gives the result of each op. ``go_on()`` does what the trace would have done; ops
    called in the context ``again`` come to the handler too. Nothing in a run that is not such a
    trace (AOT makes one before, for which autocast comes first as it does in eager)."""
    mode = _get_dispatch_mode_pre_dispatch(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    if mode is None:
        return
    traced_as_before = mode.__torch_dispatch__

    def dispatch(op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def go_on() -> Any:
            return traced_as_before(op, types, args, kwargs)

        return handler(op, go_on, mode, args, kwargs)

    mode.__torch_dispatch__ = dispatch


def is_made_of_others(op: OpOverload) -> bool:
    """Whether the dispatcher has a formula in other ops for ``op``, derivatives included."""
    return torch._C._dispatch_has_kernel(op.name()) and op._can_decompose()


@contextmanager
def untraced() -> Iterator[None]:
    """In a functional trace: a context in which ops are computed and not written down, nor are the
    data-dependent sizes that they bring into being."""
    mode = detect_fake_mode()
    env = None if mode is None else mode.shape_env
    with (
        disable_proxy_modes_tracing(),
        nullcontext() if env is None else (env.ignore_fresh_unbacked_symbols()),
    ):
        yield


def say_what_dynamo_said(module: GraphModule, captured: GraphModule) -> None:
    """``module``, made of what Dynamo ``captured`` and with the same inputs, says of these what
    that says: which are the model's own and stay where they are. The compiler that comes next need
    not look at those in every call, nor copy them for a CUDA graph."""
    ours, theirs = (each.graph.find_nodes(op="placeholder") for each in (module, captured))
    metas = {name: captured.meta[name] for name in _OF_DYNAMO if name in captured.meta}
    if module is captured or not metas or len(ours) != len(theirs):
        return
    if not all(hasattr(node, "_dynamo_source") for node in theirs):
        return
    for own, given in zip(ours, theirs, strict=True):
        own._dynamo_source = given._dynamo_source
        static = given.meta.get("tensor_dict", {}).get(_STATIC)
        if static:
            own.meta["tensor_dict"] = {_STATIC: static}
    module.meta |= metas
    given = module.named_parameters, module.named_buffers
    held = [name for named in given for name, _ in named(remove_duplicate=False)]
    sources = {name: ConstantSource(f"moe_fx.{name}") for name in held}
    object.__setattr__(module, "_param_name_to_source", sources)


_OF_DYNAMO = ("dynamo_flat_name_to_original_fqn", "dynamo_compile_id")
_STATIC = "_dynamo_static_input_type"
