"""vLLM-Ascend: the same pass in both of its compile routes (docs/vllm.md).

vLLM-Ascend has a pass manager of its own for piecewise graphs, and none where npugraph_ex compiles
whole ones. `register` puts the pass that vLLM's configuration asks for
(``inductor_passes={"post_grad_custom_post_pass": "moe_fx.vllm_pass"}``) into both:

- ``GraphFusionPassManager.configure``: with the other passes; what it makes of a graph runs op by
  op, exchanges on HCCL's own stream;
- ``_configure_backend``: as npugraph_ex's ``post_grad_custom_pre_pass``; exchanges get streams and
  events there (`moe_fx.devices.ascend.streams`). What it compiles is captured, so strategies that
  wait for the device are refused.

The steps of its layers are written for vLLM-Ascend's main branch (``AscendMoERunner``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from vllm.compilation.passes.inductor_pass import get_pass_context
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

from moe_fx.devices.ascend.compile import device_pass
from moe_fx.entry.graph_pass import module_of
from moe_fx.integrations.vllm import ops
from moe_fx.integrations.vllm.steps import Steps
from moe_fx.integrations.vllm.vllm_pass import VllmMoEPass
from moe_fx.options import Options

__all__ = ["register"]

_KEY = "post_grad_custom_post_pass"
_CAPTURING_HOOK = "post_grad_custom_pre_pass"


def register() -> None:
    """Called by `moe_fx.integrations.vllm.register` where vLLM-Ascend is installed; again it does
    nothing."""
    if isinstance(ops.steps, AscendSteps):
        return
    from vllm_ascend.compilation import compiler_interface
    from vllm_ascend.compilation.graph_fusion_pass_manager import GraphFusionPassManager

    ops.steps = AscendSteps()
    configure, configure_backend = (
        GraphFusionPassManager.configure,
        compiler_interface._configure_backend,
    )

    def with_pass(manager: Any, config: Any) -> None:
        configure(manager, config)
        if (wanted := _wanted(config)) is not None:
            manager.add(_Piecewise(config, wanted))

    def with_hook(config: Any, ascend: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        configure_backend(config, ascend, vllm_config, *args, **kwargs)
        if (wanted := _wanted(vllm_config)) is not None:
            setattr(config, _CAPTURING_HOOK, _Whole(wanted))

    GraphFusionPassManager.configure = with_pass
    compiler_interface._configure_backend = with_hook


def _wanted(config: Any) -> VllmMoEPass | None:
    found = config.compilation_config.inductor_compile_config.get(_KEY)
    return found if isinstance(found, VllmMoEPass) else None


class _Piecewise(VllmInductorPass):  # type: ignore[misc]
    """The pass among vLLM-Ascend's. What it finds is lowered to NPU ops."""

    def __init__(self, config: Any, wanted: VllmMoEPass) -> None:
        super().__init__(config)
        self.wanted = wanted

    def __call__(self, graph: Graph | GraphModule) -> None:
        _run(self.wanted, graph, "aot_eager")

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return self.wanted.is_applicable_for_range(compile_range)

    def uuid(self) -> str:
        return self.wanted.uuid()


class _Whole:
    """The pass as npugraph_ex's hook."""

    def __init__(self, wanted: VllmMoEPass) -> None:
        self.wanted = wanted

    def __call__(self, module: GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        if self.wanted.is_applicable_for_range(get_pass_context().compile_range):
            _run(self.wanted, module, "npugraph_ex")


def _run(wanted: VllmMoEPass, graph: Graph | GraphModule, base: str) -> None:
    module = graph if isinstance(graph, GraphModule) else module_of(graph)
    report = wanted.open(module.graph, captured=base == "npugraph_ex")
    if report.plans:
        device_pass(Options(base=base), report)(module)


class AscendSteps(Steps):
    """vLLM-Ascend's layers: ``AscendMoERunner`` and its ``AscendRoutedExperts``."""

    def misfit(self, layer: Any) -> str:
        experts = layer.routed_experts
        if experts.log2phy is not None:
            return "its experts are balanced over ranks (EPLB)"
        if getattr(experts, "mix_placement", False):
            return "its shared experts are among the routed ones (mix_placement)"
        return super().misfit(layer)

    def may_reduce(self, layer: Any) -> bool:
        return True  # it depends on how a step communicates

    def route(
        self, layer: Any, hidden_states: Tensor, router_logits: Tensor, input_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from vllm_ascend.ascend_forward_context import _EXTRA_CTX

        if layer.is_internal_router:
            gate = layer.gate
            weight = gate.weight_fp32 if hasattr(gate, "weight_fp32") else gate.weight.float()
            router_logits = nn.functional.linear(hidden_states.float(), weight)
        weights, ids = layer.routed_experts._select_experts(
            hidden_states=hidden_states,
            router_logits=router_logits,
            enable_force_load_balance=_EXTRA_CTX.in_profile_run,
            input_ids=input_ids,
        )
        return weights, ids

    def experts(self, layer: Any, rows: Tensor, counts: Tensor, first: int) -> Tensor:
        """By the layer's quantisation method, whose communication is replaced by none: the rows
        are where their experts are."""
        routed = layer.routed_experts
        of_all = counts.new_zeros(layer.moe_config.num_local_experts)
        of_all[first : first + len(counts)] = counts
        with _arrived(layer.moe_config, of_all):
            done = routed.quant_method.apply(
                layer=routed,
                x=rows,
                topk_weights=rows.new_ones((len(rows), 1)),
                topk_ids=torch.zeros((len(rows), 1), dtype=torch.int32, device=rows.device),
                shared_experts=None,
                shared_experts_input=None,
            )
        result: Tensor = done.routed_out
        return result

    def shared(self, layer: Any, x: Tensor) -> Tensor:
        """In the layer's own parallel mode, with the reduction that belongs to it."""
        from vllm_ascend.ops.fused_moe.shared_experts import FusedMoEEvents

        event = torch.npu.current_stream().record_event()  # type: ignore[attr-defined]
        result: Tensor = layer.ascend_shared_experts.forward(
            x, FusedMoEEvents(before_routed_experts=event)
        )
        return result


@contextmanager
def _arrived(moe_config: Any, counts: Tensor) -> Iterator[None]:
    """While experts run: the communication method that has nothing to do."""
    from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType
    from vllm_ascend.ops.fused_moe.dataclass.token_dispatcher import MoETokenDispatchOutput
    from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl
    from vllm_ascend.ops.fused_moe.token_dispatcher import MoETokenDispatcher

    class Arrived(MoETokenDispatcher):  # type: ignore[misc]
        def token_dispatch(self, token_dispatch_input: Any) -> Any:
            return MoETokenDispatchOutput(
                hidden_states=token_dispatch_input.hidden_states,
                group_list=counts,
                group_list_type=1,
                combine_metadata=None,
            )

        def token_combine(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

    class Nothing(AllGatherCommImpl):  # type: ignore[misc]
        def _get_token_dispatcher(self) -> Arrived:
            return Arrived()

    own = {"moe_comm_method": Nothing(moe_config), "moe_comm_type": MoECommType.ALLGATHER}
    before = {name: getattr(_EXTRA_CTX, name) for name in own}
    for name, value in own.items():
        setattr(_EXTRA_CTX, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_EXTRA_CTX, name, value)
