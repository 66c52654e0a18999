"""Teach a small Qwen3-MoE to write like Python's own help, its experts shared by the ranks.

::

    torchrun --nproc-per-node 2 tests/examples/fine_tune.py train --out run --steps 40
    torchrun --nproc-per-node 4 tests/examples/fine_tune.py train --out run --steps 80
    python tests/examples/fine_tune.py write --out run --prompt "The for statement"

The second command goes on from the first one's checkpoint, on another number of ranks. The third
reads the checkpoint as any other program would. A token is a byte, and nothing is downloaded.
"""

import argparse
from pathlib import Path
from pydoc_data import topics

import torch
import torch.distributed as dist
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import moe_fx

LENGTH, BATCH = 64, 16
"""Bytes of a sample, and samples of a step on all ranks together."""


def new_model():
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)  # every rank begins with the same model
    return Qwen3MoeForCausalLM(config)


def samples():
    text = "".join(topics.topics.values()).encode("ascii", "replace")
    rows = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(out, steps):
    from moe_fx.integrations.trainer import ExpertParallelTrainer

    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    model = new_model()
    moe_fx.shard_experts(model)
    model.compile(backend="moe_fx", options={"ep_group": dist.group.WORLD, "strict": True})
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=20,
        save_total_limit=2,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
    )
    held_out, taught = torch.utils.data.random_split(
        samples(), [0.02, 0.98], torch.Generator().manual_seed(0)
    )
    trainer = ExpertParallelTrainer(
        model=model, args=arguments, train_dataset=taught, eval_dataset=held_out
    )
    last = get_last_checkpoint(out) if out.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / "final"))
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"step {trainer.state.global_step} on {ranks} ranks: loss {loss:.3f} a byte")
    dist.destroy_process_group()


def write(out, prompt):
    model = Qwen3MoeForCausalLM.from_pretrained(out / "final")
    ids = torch.tensor([list(prompt.encode())])
    made = model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=0)
    print(bytes(made[0].tolist()).decode("ascii", "replace"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["train", "write"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=40, help="in all, with those made before")
    parser.add_argument("--prompt", default="The for statement", help="what the text begins with")
    given = parser.parse_args()
    if given.task == "train":
        train(given.out, given.steps)
    else:
        write(given.out, given.prompt)


if __name__ == "__main__":
    main()
