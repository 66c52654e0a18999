"""Graphs as Inductor hands them to its post-grad hooks, run without generating code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._dynamo import register_backend
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.fx import GraphModule

Hook = Callable[[torch.fx.Graph], None] | list[Callable[[torch.fx.Graph], None]]


@register_backend(name="post_grad_eager")
def post_grad_eager(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor up to and with its post-grad passes, the hooks in ``config`` among them; the graph
    then runs as it is."""
    return compile_fx(module, inputs, inner_compile=_run_as_it_is)


def _run_as_it_is(
    module: GraphModule, inputs: Sequence[Any], is_inference: bool = False, **_: Any
) -> Callable[[list[Any]], Any]:
    with V.set_fake_mode(detect_fake_mode(inputs)):
        post_grad_passes(module, is_inference)
    module.recompile()

    def run(values: list[Any]) -> Any:
        taken = list(values)
        values.clear()  # as Inductor's compiled code does: its callers rely on it
        return module(*taken)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def hooked(hook: Hook, post: bool = False) -> AbstractContextManager[Any]:
    """``hook`` is Inductor's custom pass before (or after, ``post``) its own post-grad passes."""
    name = "post_grad_custom_post_pass" if post else "post_grad_custom_pre_pass"
    return config.patch({name: hook})


def compiled_with(
    hook: Hook,
    model: Callable[..., Any],
    *,
    base: str = "post_grad_eager",
    post: bool = False,
    **compile_options: Any,
) -> Callable[..., Any]:
    """``model`` compiled with ``hook`` in place while it is called."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=base, fullgraph=True, **compile_options)

    def call(*args: Any, **kwargs: Any) -> Any:
        with hooked(hook, post):
            return compiled(*args, **kwargs)

    return call


def post_grad_graph(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    """The one graph of an inference call, as the hook before Inductor's post-grad passes gets it;
    nothing has looked at it yet, and it owns its parameters' names only."""
    graphs: list[torch.fx.Graph] = []
    with torch.no_grad():
        compiled_with(graphs.append, model)(*args, **kwargs)
    (graph,) = graphs
    assert graph.owning_module is not None
    return graph.owning_module
