"""vLLM's MoE runner around experts written out in PyTorch, and graphs in which its op stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import LayerName

from moe_fx.integrations.vllm import layout, ops

EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 32, 32
NAME = "model.layers.0.mlp.experts"


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(EXPERTS, HIDDEN, 2 * WIDTH, generator=generator)
    return up / HIDDEN**0.5, torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator) / WIDTH**0.5


def tokens(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """And the router's logits."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, HIDDEN + EXPERTS, generator=generator)
    return drawn[:, :HIDDEN].contiguous(), drawn[:, HIDDEN:].contiguous()


def select(logits: Tensor) -> tuple[Tensor, Tensor]:
    scores, ids = logits.softmax(-1).topk(TOP_K)
    return scores / scores.sum(-1, keepdim=True), ids.to(torch.int32)


def one_expert(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, linear = (rows @ up).chunk(2, -1)
    return (nn.functional.silu(gate) * linear) @ down


def dense(x: Tensor, logits: Tensor) -> Tensor:
    """What the layer's routed experts compute, one by one."""
    of_each = torch.stack([one_expert(x, *pair) for pair in zip(*weights(), strict=True)], 1)
    factors, ids = select(logits)
    picked = of_each.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, HIDDEN))
    return (picked * factors.unsqueeze(-1)).sum(1)


class Experts(nn.Module):
    """Of one rank; ids are of local experts, as vLLM's kernels for CPUs take them."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.pairs = list(zip(*(table[first : first + count] for table in weights()), strict=True))
        self.log2phy = None  # vLLM-Ascend's experts have one
        self.expert_map_manager = SimpleNamespace(placement_strategy="linear")

    def _ensure_moe_quant_config_init(self) -> None: ...

    def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        assert topk_ids.shape == (len(x), 1) and bool((topk_weights == 1).all())
        pairs = [self.pairs[int(expert)] for expert in topk_ids]
        results = [one_expert(row.float(), *pair) for row, pair in zip(x, pairs, strict=True)]
        return torch.stack(results).to(x.dtype)


@dataclass(frozen=True)
class Kernel:
    """What a layer's kernel says of its result."""

    reduces: bool

    def output_is_reduced(self) -> bool:
        return self.reduces


class Router:
    def select_experts(self, router_logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return select(router_logits)


def runner(
    rank: int,
    world: int,
    data_parallel: bool = False,
    weighs_tokens: bool = False,
    fuses_gate: bool = False,
    monolithic: bool = False,
    kernel: Kernel | None = None,
    **config: Any,
) -> MoERunner:
    """``config``: what differs from a layer that can be opened."""
    local = EXPERTS // world
    parallel: dict[str, Any] = {
        "use_ep": True,
        "enable_eplb": False,
        "is_sequence_parallel": False,
        "pcp_size": 1,
        "ep_size": world,
        "dp_size": world if data_parallel else 1,
    }
    own: dict[str, Any] = {
        "num_experts": EXPERTS,
        "experts_per_token": TOP_K,
        "hidden_dim": HIDDEN,
        "num_local_experts": local,
        "ep_rank": rank,
        "is_lora_enabled": False,
        "use_deferred_moe_finalize": False,
    }
    parallel |= {name: config.pop(name) for name in list(config) if name in parallel}
    layer = MoERunner.__new__(MoERunner)
    nn.Module.__init__(layer)
    layer.layer_name = NAME
    layer.moe_config = SimpleNamespace(
        **(own | config), moe_parallel_config=SimpleNamespace(**parallel)
    )
    layer.routed_experts = Experts(rank * local, local)
    layer.router = Router()
    layer.gate = None
    layer._fse_fuse_gate = fuses_gate
    layer.routed_experts.apply_router_weight_on_input = weighs_tokens
    layer.routed_experts.quant_method = SimpleNamespace(moe_kernel=kernel, is_monolithic=monolithic)
    layer._shared_experts = SimpleNamespace(_layer=lambda x: 3 * x)
    return layer


@contextmanager
def running(layer: MoERunner, group: Any, tensor_parallel: bool) -> Iterator[None]:
    """As in a forward pass of vLLM: ``group``: of the experts, and of tensor parallelism."""
    rank, world = group.rank(), group.size()
    experts = SimpleNamespace(device_group=group, world_size=world, rank_in_group=rank)
    alike = experts if tensor_parallel else SimpleNamespace(world_size=1, rank_in_group=0)
    context: Any = SimpleNamespace(no_compile_layers={NAME: layer}, all_moe_layers=None)
    with (
        mock.patch.object(layout, "get_ep_group", lambda: experts),
        mock.patch.object(layout, "get_tp_group", lambda: alike),
        mock.patch.object(ops, "tensor_model_parallel_all_reduce", all_reduced),
        override_forward_context(context),
    ):
        yield


def all_reduced(result: Tensor) -> Tensor:
    total = result.clone()
    dist.all_reduce(total)
    return total


def routed(x: Tensor, logits: Tensor) -> Tensor:
    result: Tensor = torch.ops.vllm.moe_forward(x, logits, None, None, LayerName(NAME), 0)
    return result * 1


def routed_and_shared(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    shared, result = torch.ops.vllm.moe_forward_shared(x, logits, x, None, LayerName(NAME), 0)
    return shared * 1, result * 1


def inlined(rank: int, world: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer as vLLM writes it out on CPUs, with this rank's weights as its kernel has them."""
    local = EXPERTS // world
    up, down = (table[rank * local :][:local].transpose(1, 2).contiguous() for table in weights())
    packed = [cpu_prepack_moe_weight(table, "vec") for table in (up, down)]

    def run(x: Tensor, logits: Tensor) -> Tensor:
        factors, ids = select(logits)
        result = torch.empty_like(x)
        cpu_fused_moe(result, x, *packed, None, None, factors, ids, "silu", "vec")
        return result

    return run


def compiled(function: Callable[..., Any], own: Callable[[Any], Any]) -> Callable[..., Any]:
    """Whose graph is given to ``own`` as Inductor gives it to its passes."""

    def forward(module: Any, inputs: Any) -> Any:
        own(module.graph)
        module.recompile()
        return make_boxed_func(module.forward)

    return torch.compile(function, backend=aot_autograd(fw_compiler=forward), fullgraph=True)
