"""What runs on a rank in `test_checkpointing.py`: a model that computes its layers again in
backward, against the same model, whole and eager, on one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_fx
from moe_fx.integrations.transformers import sharded_loading
from moe_fx.shard import shard_experts
from tests.e2e.ranks import _compare_gradients, _gradients, relative_error
from tests.models import build, token_ids


@dataclass
class Trained:
    """error, gradient_errors: relative to the eager reference. sent: bytes of rows that were sent
    in forward and backward. saved: bytes held between forward and backward that are no parameter's
    or input's."""

    error: float
    gradient_errors: dict[str, float]
    sent: tuple[int, int]
    saved: int
    report: dict[str, Any] = field(default_factory=dict)


class Saved(saved_tensors_hooks):
    """Counts the bytes of what autograd saves, once for each storage."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[int, int] = {}
        self.model = {t.untyped_storage().data_ptr() for t in model.parameters()}
        self.model |= {t.untyped_storage().data_ptr() for t in model.buffers()}
        super().__init__(self._save, lambda saved: saved)

    def _save(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self.model:
            self.of[storage.data_ptr()] = storage.nbytes()
        return saved

    @property
    def bytes(self) -> int:
        return sum(self.of.values())


def enable(model: PreTrainedModel, reentrant: bool | None) -> None:
    """Compute each layer again in backward; None: do not."""
    model.train()
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


def train(
    rank: int,
    program: str,
    reentrant: bool | None,
    base: str = "aot_eager",
    folder: str | None = None,
    backend: str = "moe_fx",
    impl: str = "grouped_mm",
    lengths: tuple[int, ...] = (9, 5),
    family: str = "qwen3_moe",
    **given: Any,
) -> Trained:
    """One step of a two-layer model. program: "replicated", "gathered", "loaded" (gathered, as
    `sharded_loading` makes it from ``folder``) or "local". backend: "moe_fx", another compiler's,
    or "" for none. given: options."""
    model, config = build(family, impl)
    ids = token_ids(config, 1, lengths[rank], seed=rank)
    model.train()
    expected = model(input_ids=ids, use_cache=False).logits
    wanted = _gradients(model, expected)
    group = dist.group.WORLD
    assert group is not None
    if program == "gathered":
        shard_experts(model, group)
    elif program == "loaded":
        with sharded_loading(group):
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=impl)
    enable(model, reentrant)
    reports: list[moe_fx.Report] = []
    run: Callable[..., Any] = model
    if backend == "moe_fx":
        options: dict[str, Any] = {"base": base, "on_report": reports.append, "strict": True}
        if program == "replicated":
            options["ep_group"] = group
        run = torch.compile(model, backend="moe_fx", fullgraph=True, options=options | given)
    elif backend:
        run = torch.compile(model, backend=backend, fullgraph=True)
    sent = moe_fx.ops.exchange.bytes_sent
    run(input_ids=ids, use_cache=False)  # what is saved while it is compiled is not the model's
    before = sent(group.group_name)
    saved = Saved(model)
    with saved:
        found = run(input_ids=ids, use_cache=False).logits
    between = sent(group.group_name)
    gradients = _gradients(model, found)
    return Trained(
        error=relative_error(found.detach(), expected.detach()),
        gradient_errors=_compare_gradients(model, wanted, gradients),
        sent=(between - before, sent(group.group_name) - between),
        saved=saved.bytes,
        report=reports[0].to_dict() if reports else {},
    )
