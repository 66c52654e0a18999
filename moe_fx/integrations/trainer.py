"""transformers' Trainer for a model whose experts are sharded.

::

    moe_fx.shard_experts(model)
    model.compile(backend="moe_fx", options={"ep_group": torch.distributed.group.WORLD})
    trainer = ExpertParallelTrainer(model=model, args=args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)

Contract. Every rank calls it, under torchrun, as without shards: Trainer wraps the model in DDP,
whose mean of gradients holds for the shards too. Norms are of the whole model. A checkpoint has the
whole model, as ``save_pretrained`` writes it, and the optimizer's state in a folder of
`torch.distributed.checkpoint`: any number of ranks resumes from it, and `from_pretrained` reads it
anywhere. A model without shards is trained as by transformers' Trainer.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from moe_fx.compat import resolve_group
from moe_fx.errors import ConfigurationError
from moe_fx.weights.clip import clip_grad_norm_
from moe_fx.weights.data_parallel import saves_shards
from moe_fx.weights.expert_parameters import Slot, slots
from moe_fx.weights.pretrained import is_pretrained, load_like
from moe_fx.weights.whole import full_state_dict

__all__ = ["ExpertParallel", "ExpertParallelTrainer"]

log = logging.getLogger("moe_fx")

_OPTIMIZER = "optimizer_shards"
"""Folder of the optimizer's state in a checkpoint."""

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ExpertParallel(_Base):
    """For trainers that derive from transformers': ``class Mine(ExpertParallel, YourTrainer)``.

    Raises `ConfigurationError` for a model sharded by FSDP or DeepSpeed as well, for fp16, and for
    a checkpoint whose optimizer state is not one of shards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._shards:
            self._refuse_others()
            saves_shards(self._plain)

    def _refuse_others(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigurationError(
                "ExpertParallelTrainer trains a model whose experts are sharded in DDP. Switch "
                "FSDP and DeepSpeed off in TrainingArguments (fsdp, deepspeed), or use "
                "fully_shard in a loop of your own (docs/sharding.md)."
            )
        if self.args.fp16:
            raise ConfigurationError(
                "ExpertParallelTrainer does not scale gradients: ranks would find infinities in "
                "their own experts only, and skip different steps. Give bf16=True, not fp16=True."
            )

    @property
    def _plain(self) -> nn.Module:
        """The model that has the shards, without wrappers."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    @property
    def _shards(self) -> list[Slot]:
        return [slot for slot in slots(self._plain) if slot.unshard is not None]

    @functools.cached_property
    def _trains_shards(self) -> bool:
        """Asked in every step."""
        return bool(self._shards)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Shards in groups of their own: one call for many parameters (``foreach``, ``fused``)
        takes tensors of one kind."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not optimizer.state:
            split = [part for group in optimizer.param_groups for part in _by_kind(group)]
            optimizer.param_groups[:] = split
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if not self._trains_shards:
            return super()._clip_grad_norm(model)
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._trains_shards:
            grad_norm = clip_grad_norm_(model.parameters(), float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    # -- checkpoints -------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every rank calls it."""
        if not self._shards:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        plain: Any = self._plain
        if is_pretrained(plain):
            plain.save_pretrained(folder)
        elif hasattr(plain, "peft_config"):
            plain.save_pretrained(folder, is_main_process=self.args.should_save)
        else:
            whole = full_state_dict(plain)
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(whole, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.args.should_save:
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        plain: Any = self._plain
        shards = self._shards
        if not shards or not is_pretrained(plain):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        names = [slot.full_name for slot in shards]
        loaded = load_like(plain, _group(shards), names, resume_from_checkpoint)
        plain.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not self._shards or best is None:
            super()._load_best_model()
            return
        log.info("loads the best model, %s (score: %s)", best, self.state.best_metric)
        self._load_from_checkpoint(best)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = {"optimizer": get_optimizer_state_dict(self._plain, _bare(self.optimizer))}
        dcp.save(state, checkpoint_id=Path(output_dir) / _OPTIMIZER)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        if not (folder / _OPTIMIZER).is_dir():
            if (folder / OPTIMIZER_NAME).exists():
                raise ConfigurationError(
                    f"{folder / OPTIMIZER_NAME} is the optimizer state of a model that is not "
                    f"sharded; that of a sharded one is a folder, {_OPTIMIZER}. Resume from a "
                    "checkpoint of ExpertParallelTrainer, or load the weights alone with "
                    "from_pretrained and begin anew."
                )
            log.warning("%s has no optimizer state: it begins anew", folder)
            return
        plain, optimizer = self._plain, _bare(self.optimizer)
        state = {"optimizer": get_optimizer_state_dict(plain, optimizer)}
        dcp.load(state, checkpoint_id=folder / _OPTIMIZER)
        set_optimizer_state_dict(plain, optimizer, state["optimizer"])
        schedule: Any = self.lr_scheduler
        schedule.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


class ExpertParallelTrainer(ExpertParallel, Trainer):
    """transformers' Trainer for a model whose experts `moe_fx.shard_experts` has sharded, or
    `sharded_loading`. The arguments are Trainer's."""


def _by_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group in two: whole parameters, and shards."""
    kinds: dict[bool, list[Any]] = {}
    for param in group["params"]:
        kinds.setdefault(isinstance(param, DTensor), []).append(param)
    return [group | {"params": params} for params in kinds.values()]


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _group(shards: list[Slot]) -> dist.ProcessGroup:
    unshard = shards[0].unshard
    assert unshard is not None
    return resolve_group(unshard.group_name)
