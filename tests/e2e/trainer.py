"""One run of transformers' Trainer, of the same data however many ranks there are.

``torchrun --nproc-per-node 2 -m tests.e2e.trainer --out folder [--sharded] ...`` prints what
Trainer logged, and writes the model it ends with.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import moe_fx

BATCH, ACCUMULATED, STEPS = 8, 2, 8
"""Samples of a step, in so many parts."""


def model_of(seed: int = 0) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(64, (count, 10), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in drawn]


def arguments(out: str, bf16: bool, world: int, evaluates: bool) -> TrainingArguments:
    kept: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
    }
    return TrainingArguments(
        out,
        per_device_train_batch_size=BATCH // ACCUMULATED // world,
        per_device_eval_batch_size=BATCH // world,
        gradient_accumulation_steps=ACCUMULATED,
        gradient_checkpointing=True,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **(kept if evaluates else {"save_strategy": "no"}),
    )


def sharding_trainer(on_fsdp: bool) -> Any:
    """on_fsdp: one of a user's, on which FSDP is on. (On CPUs transformers leaves it off.)"""
    from moe_fx.integrations.trainer import ExpertParallel, ExpertParallelTrainer

    if not on_fsdp:
        return ExpertParallelTrainer

    class OnFsdp(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    class Mine(ExpertParallel, OnFsdp):
        pass

    return Mine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--plain", action="store_true", help="transformers' Trainer all the same")
    parser.add_argument("--wrong", choices=["fsdp", "fp16"], help="what is refused")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(str(given.out), given.bf16, world, evaluates=not given.bf16)
    if given.wrong == "fp16":
        args = TrainingArguments(str(given.out), use_cpu=True, report_to=[], fp16=True)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    model: Any = model_of()
    kind: Any = Trainer
    if given.sharded:
        kind = Trainer if given.plain else sharding_trainer(given.wrong == "fsdp")
        moe_fx.shard_experts(model)
    if given.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        adapted = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapted)
    options = {"ep_group": dist.group.WORLD, "progress": False, "base": "aot_eager"}
    if given.compiled:
        model.compile(backend="moe_fx", options=options)
    trainer = kind(model, args, train_dataset=samples(80, 1), eval_dataset=samples(16, 2))
    trainer.train(resume_from_checkpoint=str(given.resume) if given.resume else None)
    trainer.save_model(str(given.out / "last"))
    if trainer.is_world_process_zero():
        keys = ("step", "loss", "grad_norm", "eval_loss")
        logged = [{key: entry[key] for key in keys if key in entry} for entry in history(trainer)]
        print("LOGGED", json.dumps({"history": logged, "best": trainer.state.best_global_step}))
    if dist.is_initialized():
        dist.destroy_process_group()


def history(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


if __name__ == "__main__":
    main()
