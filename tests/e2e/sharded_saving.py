"""What runs on a rank in `test_sharded_models.py`: a sharded model saved, loaded, averaged and
handed to transformers and PEFT."""

from __future__ import annotations

import contextlib
import copy
import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import moe_fx
from moe_fx.weights import pretrained as pretrained_module
from tests.e2e.sharded import EXPERTS, Experts, Model, batch, distance

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


def unsharded(rank: int) -> list[float]:
    """Differences of a model, sharded and trained a step, made whole, from one process's; of a
    plain step after that; and of what it computes when it is sharded again."""
    model, before = _one_step(moe_fx.shard_experts(Model()))
    one, _ = _one_step(Model())
    assert moe_fx.unshard_experts(model) is model
    assert type(model.mlp) is Experts and type(model.mlp.weight) is nn.Parameter
    assert model.mlp.weight.requires_grad and model.mlp.weight.shape[0] == EXPERTS
    found = [distance(model.state_dict(), one.state_dict())]
    wrapped = DistributedDataParallel(model)
    for each in (wrapped, one):
        each.zero_grad()
        each(*batch(0)).square().mean().backward()
    grads = [{k: p.grad for k, p in each.named_parameters()} for each in (model, one)]
    found.append(distance(*grads))
    with pytest.raises(moe_fx.ConfigurationError, match="after unshard_experts"):
        before.step()
    again = moe_fx.shard_experts(model)
    found.append(float((again(*batch(rank)) - one(*batch(rank))).abs().max()))
    assert moe_fx.unshard_experts(Model()) is not None  # nothing to do, and no rank is waited for
    return found


def unsharded_pretrained(rank: int, path: Path) -> list[str]:
    """Files that rank 0 alone writes of a transformers model made whole."""
    from tests.models import build

    model, _ = build("qwen3_moe", "grouped_mm", torch.float32)
    moe_fx.unshard_experts(moe_fx.shard_experts(model))
    if rank == 0:
        model.save_pretrained(path)
    return sorted(each.name for each in path.iterdir()) if rank == 0 else []


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


def streamed(rank: int, path: Path, family: str) -> tuple[float, list[str], list[str]]:
    """(difference of what was written from the model, names of tensors in the checkpoint of the
    sharded model, of the whole model)."""
    from transformers import AutoModelForCausalLM

    from moe_fx.weights.safetensors_file import names_in
    from tests.models import build

    model, _ = build(family)
    whole_model = copy.deepcopy(model)
    moe_fx.shard_experts(model)
    with mock.patch.object(pretrained_module, "full_state_dict", side_effect=AssertionError):
        for _ in range(2):  # the second time over the first
            model.save_pretrained(
                path / "streamed", max_shard_size="60KB", is_main_process=not rank
            )
    if rank:
        return 0.0, [], []
    whole_model.save_pretrained(path / "whole")
    names = [
        sorted(name for names in names_in(path / kind).values() for name in names)
        for kind in ("streamed", "whole")
    ]
    found = AutoModelForCausalLM.from_pretrained(path / "streamed")
    leftover = [each.name for each in (path / "streamed").iterdir() if each.is_dir()]
    assert leftover == []
    return distance(found.state_dict(), whole_model.state_dict()), *names


def killed(rank: int, path: Path) -> float:
    """Difference of the checkpoint in ``path`` from the model that was saved there, once another
    save has ended before its index was written."""
    from transformers import AutoModelForCausalLM

    from moe_fx.weights import streaming
    from tests.models import build

    model, _ = build("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moe_fx.shard_experts(model).save_pretrained(path)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    replaced = streaming.os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith("index.json"):
            raise KeyboardInterrupt
        replaced(source, target)

    with (
        mock.patch.object(streaming.os, "replace", replace),
        mock.patch.object(pretrained_module, "meet"),
        contextlib.suppress(KeyboardInterrupt),
    ):
        model.save_pretrained(path)
    dist.barrier()
    return distance(AutoModelForCausalLM.from_pretrained(path).state_dict(), before)


def memory(rank: int, path: Path) -> tuple[int, int]:
    """(bytes by which the peak of this rank's memory grew while a model was saved, bytes of the
    largest table)."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.models import build

    small, _ = build("qwen3_moe")
    moe_fx.shard_experts(small).save_pretrained(path / "small")  # what is imported first, stays
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 32}
    config = Qwen3MoeConfig(
        **sizes, num_hidden_layers=8, vocab_size=64, num_attention_heads=4, num_key_value_heads=4
    )
    model = moe_fx.shard_experts(Qwen3MoeForCausalLM(config))
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    model.save_pretrained(path / "large")
    return _status("VmHWM") - before, largest


def _status(name: str) -> int:
    """Of this process, in bytes."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return 1024 * int(line.split()[1])


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
