"""What runs on a rank in `test_sharded_models.py`: a sharded model in the hands of
torch's and other tools, beside the same model whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, parameters_to_vector, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import moe_fx
from tests.e2e.ranks import expert_block

EXPERTS = 4
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}


class Experts(nn.Module):
    """Reads its weights once for each expert that was hit."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, 8, 8))
        self.bias = nn.Parameter(torch.randn(EXPERTS, 8))

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for expert in ids.unique().tolist():
            rows = ids == expert
            out[rows] = tokens[rows] @ self.weight[expert] + self.bias[expert]
        return out


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(8, 8)
        self.mlp = Experts()
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        return self.mlp(self.inner(tokens) * self.scale, ids)


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """Others on each rank, as many, and no expert is hit on all of them."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.tensor([rank % EXPERTS, 1, rank % EXPERTS, 3, 3])
    return torch.randn(5, 8, generator=generator), ids


def whole(state: Any) -> dict[str, Tensor]:
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


def distance(one: Any, other: Any) -> float:
    one, other = whole(one), whole(other)
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


# ---- Training


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_of_compiled(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"))


def compiled_ddp(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


def fsdp2(model: nn.Module) -> nn.Module:
    shards = moe_fx.shards_for_data_parallel(model)
    fully_shard(model.get_submodule("inner"), ignored_params=shards)
    fully_shard(model, ignored_params=shards)
    return model


def pairs() -> dist.ProcessGroup:
    """This rank's, of two that share the experts each."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"].get_group()


def trained(
    rank: int, wrap: Callable[..., Any], optimizer: str, in_pairs: bool = False, steps: int = 3
) -> tuple[float, list[float]]:
    """(largest difference of a parameter, relative difference of each step's norm) after training
    with clipping, from one process that has the batches of all ranks."""
    model = moe_fx.shard_experts(Model(), pairs() if in_pairs else None)
    wrapped = wrap(model)
    opt = OPTIMIZERS[optimizer](wrapped.parameters())
    one = Model()
    one_opt = OPTIMIZERS[optimizer](one.parameters())
    norms = []
    for step in range(steps):
        opt.zero_grad()
        wrapped(*batch(rank, step)).square().mean().backward()
        norm = moe_fx.clip_grad_norm_(wrapped.parameters(), 0.5)
        opt.step()
        one_opt.zero_grad()
        losses = [one(*batch(r, step)).square().mean() for r in range(dist.get_world_size())]
        torch.stack(losses).mean().backward()
        want = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
        one_opt.step()
        norms.append(float((_plain(norm) - want).abs() / want))
    return distance(model.state_dict(), one.state_dict()), norms


def _plain(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def accumulated(rank: int) -> float:
    """Two batches a step, the first under ``no_sync``: difference from one process."""
    model = DistributedDataParallel(moe_fx.shard_experts(Model()))
    with model.no_sync():
        model(*batch(rank, 0)).square().mean().backward()
    model(*batch(rank, 1)).square().mean().backward()
    one = Model()
    world = dist.get_world_size()
    for step in range(2):
        for r in range(world):
            (one(*batch(r, step)).square().mean() / world).backward()
    return distance(
        {k: p.grad for k, p in model.module.named_parameters()},
        {k: p.grad for k, p in one.named_parameters()},
    )


def norm(rank: int, kind: float) -> tuple[float, float]:
    """(norm of a sharded model's gradients, of the whole model's); clipped alike."""
    model, one = moe_fx.shard_experts(Model()), Model()
    for name, param in model.named_parameters():
        grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name)))
        one.get_parameter(name).grad = grad.clone()
    model.load_state_dict({k: p.grad for k, p in one.named_parameters()}, strict=False)
    for param in model.parameters():  # the gradients are the weights that were loaded
        param.grad = param.detach().clone()
    found = moe_fx.clip_grad_norm_(model.parameters(), 0.5, kind)
    expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5, kind)
    grads = {k: p.grad for k, p in model.named_parameters()}
    assert distance(grads, {k: p.grad for k, p in one.named_parameters()}) < 1e-6
    return float(found), float(expected)


# ---- Errors


def wrapped_deeper(model: Model) -> None:
    DistributedDataParallel(nn.Sequential(model))


def fsdp1(model: Model) -> None:
    FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2_of_shards(model: Model) -> None:
    fully_shard(model)


def torch_clip(model: Model) -> None:
    model(*batch(dist.get_rank())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def torch_clip_one_by_one(model: Model) -> None:
    model(*batch(dist.get_rank())).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)


def torch_clip_value(model: Model) -> None:
    model(*batch(dist.get_rank())).sum().backward()
    clip_grad_value_(model.parameters(), 0.5)


def foreach_optimizer(model: Model) -> None:
    model(*batch(dist.get_rank())).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1, foreach=True).step()


def foreach_average(model: Model) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    average.update_parameters(model)


def one_vector(model: Model) -> None:
    parameters_to_vector(model.parameters())


def safetensors_file(model: Model) -> None:
    from safetensors.torch import save

    save(model.state_dict())


def whole_parameter(model: Model) -> None:
    model.mlp.weight = nn.Parameter(torch.zeros(EXPERTS, 8, 8))


def parametrised(model: Model) -> None:
    parametrize.register_parametrization(model.mlp, "weight", nn.Identity())


def pruned(model: Model) -> None:
    torch.nn.utils.prune.l1_unstructured(model.mlp, "weight", 0.5)


def weight_norm(model: Model) -> None:
    torch.nn.utils.weight_norm(model.mlp, "weight")


def whole_call(model: Model) -> None:
    whole_weights = dict(Model().named_parameters())
    torch.func.functional_call(model, whole_weights, batch(dist.get_rank()))


def wrong_shape(model: Model) -> None:
    model.load_state_dict(model.state_dict() | {"mlp.bias": torch.zeros(3, 8)})


def refusal(rank: int, use: Callable[[Model], None]) -> str:
    """What ``use`` raises, given a sharded model; "" if nothing."""
    model = moe_fx.shard_experts(Model())
    try:
        use(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def early_optimizer(rank: int) -> str:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moe_fx.shard_experts(model)
    model(*batch(rank)).sum().backward()
    try:
        optimizer.step()
    except moe_fx.ConfigurationError as error:
        return str(error)
    return ""


def compiled_in_pairs(rank: int) -> tuple[float, list[str]]:
    """A block of transformers in DDP, compiled by moe_fx, the experts shared by pairs of four
    ranks: difference from one process after some steps, and the strategies."""
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    options = {"base": "aot_eager", "on_report": reports.append, "strict": True}
    model = moe_fx.shard_experts(expert_block(), pairs())
    wrapped = DistributedDataParallel(torch.compile(model, backend="moe_fx", options=options))
    one = expert_block()
    opt, one_opt = (OPTIMIZERS["SGD"](each.parameters()) for each in (wrapped, one))
    for step in range(3):
        every = [
            torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(10 * step + each))
            for each in range(4)
        ]
        opt.zero_grad()
        wrapped(every[rank]).square().mean().backward()
        moe_fx.clip_grad_norm_(wrapped.parameters(), 0.5)
        opt.step()
        one_opt.zero_grad()
        torch.stack([one(each).square().mean() for each in every]).mean().backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
        one_opt.step()
    plans = [plan.strategy for report in reports for plan in report.plans]
    return distance(model.state_dict(), one.state_dict()), plans


def uneven_groups_in_ddp(rank: int) -> str:
    """Experts shared by two of four ranks, and by none."""
    groups = [dist.new_group([0, 1]), dist.new_group([2]), dist.new_group([3])]
    model = moe_fx.shard_experts(Model(), groups[max(0, rank - 1)])
    try:
        DistributedDataParallel(model)
    except moe_fx.ConfigurationError as error:
        return str(error)
    return ""


def with_accelerator(rank: int) -> str:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    torchrun = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": dist.get_world_size(),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29500,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in torchrun.items():
            patch.setenv(name, str(value))
        accelerator = Accelerator(cpu=True)
        try:
            accelerator.prepare(moe_fx.shard_experts(Model()))
        except moe_fx.ConfigurationError as error:
            return str(error)
        finally:
            AcceleratorState._reset_state(True)
    return ""
