"""What runs on a rank in `test_sharded_models.py`: a sharded model in the hands of
torch's and other tools, beside the same model whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, parameters_to_vector, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import moe_fx

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


def trained(rank: int, wrap: Callable[..., Any], optimizer: str) -> tuple[float, list[float]]:
    """(largest difference of a parameter, relative difference of each step's norm) after training
    with clipping, from one process that has the batches of all ranks."""
    model = moe_fx.shard_experts(Model())
    wrapped = wrap(model)
    opt = OPTIMIZERS[optimizer](wrapped.parameters())
    one = Model()
    one_opt = OPTIMIZERS[optimizer](one.parameters())
    norms = []
    for step in range(3):
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


def subgroup_in_ddp(rank: int) -> str:
    """Experts shared by pairs of four ranks: copies of a shard would drift apart."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = moe_fx.shard_experts(Model(), pairs[rank // 2])
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


# ---- Saving and loading


def saved(rank: int, path: Path) -> None:
    """One AdamW step of a sharded model, saved with its optimizer by DCP."""
    model, optimizer = _one_step(moe_fx.shard_experts(Model()))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=path)


def _one_step(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for r in range(2):  # the same batches on every rank: no need to reduce
        model(*batch(r)).square().mean().backward()
    for param in model.parameters():
        if isinstance(param, DTensor) and param.grad is not None:
            param.grad /= dist.get_world_size()
    optimizer.step()
    return model, optimizer


def loaded(rank: int, path: Path, sharded: bool) -> tuple[float, float]:
    """(difference of the weights, of the moments) of what ``path`` holds from one process's."""
    model: nn.Module = Model(seed=1)
    if sharded:
        moe_fx.shard_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    one, one_optimizer = _one_step(Model())
    errors = [distance(model.state_dict(), one.state_dict())]
    names = {param: name for name, param in one.named_parameters()}
    of_one = {names[p]: s for p, s in one_optimizer.state.items()}
    for param, moments_of in optimizer.state.items():
        name = next(n for n, p in model.named_parameters() if p is param)
        errors.append(distance(moments_of, of_one[name]))
    assert len(errors) == 1 + len(of_one)
    return errors[0], max(errors[1:])


def gathered(rank: int) -> tuple[list[str], float]:
    """(names, difference from the whole model) of rank 0's full state dict."""
    state = moe_fx.full_state_dict(DistributedDataParallel(moe_fx.shard_experts(Model())))
    return list(state), distance(state, Model().state_dict()) if rank == 0 else 0.0


def gathered_by_one(rank: int) -> str:
    model = moe_fx.shard_experts(Model())
    if rank == 0:
        try:
            moe_fx.full_state_dict(model, timeout=1.0)
        except moe_fx.RanksDiffer as error:
            return str(error)
    return ""


def given_whole(rank: int, assign: bool) -> float:
    """Difference of a sharded model that was given a whole state dict from what it was given."""
    given = Model(seed=1).state_dict()
    model = moe_fx.shard_experts(Model())
    model.load_state_dict(given, assign=assign)
    assert isinstance(model.mlp._parameters["weight"], DTensor)
    assert torch.equal(model.mlp.weight, given["mlp.weight"])
    return distance(model.state_dict(), given)


def given_anothers(rank: int, path: Path) -> str:
    """What it says to a file that rank 0 alone saved."""
    model = moe_fx.shard_experts(Model())
    if rank == 0:
        torch.save(model.state_dict(), path)
    dist.barrier()
    try:
        model.load_state_dict(torch.load(path))
    except RuntimeError as error:
        return str(error)
    return ""


def given_its_own(rank: int, path: Path) -> float:
    model = moe_fx.shard_experts(Model())
    torch.save(model.state_dict(), path / str(rank))
    other = moe_fx.shard_experts(Model(seed=1))
    other.load_state_dict(torch.load(path / str(rank)))
    return distance(other.state_dict(), Model().state_dict())


# ---- What a module can do


def averaged(rank: int, decay: float | None) -> float:
    averages: Any = {} if decay is None else {"avg_fn": get_ema_avg_fn(decay)}
    models = [moe_fx.shard_experts(Model()), Model()]
    means = [AveragedModel(model, **averages) for model in models]
    for step in range(3):
        for model, mean in zip(models, means, strict=True):
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(step)
            mean.update_parameters(model)
    return distance(means[0].module.state_dict(), means[1].module.state_dict())


def cast(rank: int) -> float:
    """Through bfloat16 and a copy, then a step of the optimizer."""
    models = [moe_fx.shard_experts(Model()), Model()]
    outputs = []
    for at, model in enumerate(models):
        models[at] = model = copy.deepcopy(model.to(torch.bfloat16)).double()
        out = model(*(t.double() if t.is_floating_point() else t for t in batch(0)))
        out.sum().backward()
        for param in model.parameters():
            if isinstance(param, DTensor) and param.grad is not None:
                param.grad /= dist.get_world_size()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        outputs.append(out.detach())
    assert torch.equal(*outputs)
    return distance(models[0].state_dict(), models[1].state_dict())


# ---- transformers and PEFT


def pretrained(rank: int, path: Path) -> float:
    """Difference between a model and what its ``save_pretrained`` wrote while it was sharded."""
    from transformers import AutoModelForCausalLM

    from moe_fx.integrations.transformers import sharded_loading
    from tests.models import build

    model, _ = build("qwen3_moe")
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    moe_fx.shard_experts(model).save_pretrained(path / "one")
    with sharded_loading():
        by_shards = AutoModelForCausalLM.from_pretrained(path / "one")
    copy.deepcopy(by_shards).save_pretrained(path / "more", max_shard_size="40KB")
    assert len(list((path / "more").glob("*.safetensors"))) > 1
    errors = [
        distance(AutoModelForCausalLM.from_pretrained(path / name).state_dict(), expected)
        for name in ("one", "more")
    ]
    return max(errors)


def adapted(rank: int) -> tuple[float, str]:
    """(difference of LoRA's gradients on attention in DDP from one process's, what it says to
    adapters on the experts' own parameters)."""
    from peft import LoraConfig, get_peft_model

    from tests.models import build, token_ids

    def lora(model: Any, **targets: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets))

    def loss(model: Any, r: int) -> Tensor:
        ids = token_ids(config, 1, 6, seed=r)
        return model(input_ids=ids, use_cache=False).logits.float().square().mean()

    (first, config), (second, _) = build("qwen3_moe"), build("qwen3_moe")
    sharded = lora(moe_fx.shard_experts(first), target_modules=["q_proj"])
    wrapped = DistributedDataParallel(sharded)
    loss(wrapped, rank).backward()
    one = lora(second, target_modules=["q_proj"])
    for r in range(dist.get_world_size()):
        (loss(one, r) / dist.get_world_size()).backward()
    grads = [
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (sharded, one)
    ]
    third, _ = build("qwen3_moe")
    try:
        model = lora(moe_fx.shard_experts(third), target_parameters=["experts.down_proj"])
        loss(model, rank)
    except Exception as error:
        return distance(*grads), f"{type(error).__name__}: {error}"
    return distance(*grads), ""
