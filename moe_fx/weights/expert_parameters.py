"""Which parameters of a model are experts', and which of their rows a rank keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from moe_fx.errors import ConfigurationError
from moe_fx.ranks.groups import check_device
from moe_fx.weights.unshard import Unshard, shards_of


@dataclass(frozen=True)
class Slot:
    """``module.<name>``, a parameter or buffer of a model.

    full_name: what it is called in the model, ``"layers.0.experts.w1"``.
    unshard: how it is read, if it is this rank's shard.
    """

    module: nn.Module
    name: str
    full_name: str
    unshard: Unshard | None

    @property
    def tensor(self) -> Tensor:
        held: dict[str, Any] = {**self.module._buffers, **self.module._parameters}
        return held[self.name]

    @property
    def in_state_dict(self) -> bool:
        return self.name not in self.module._non_persistent_buffers_set


def slots(model: nn.Module) -> list[Slot]:
    """Every parameter and buffer of ``model``; a tied one once for each of its names."""
    found = []
    for path, module in model.named_modules():
        unshards = shards_of(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full_name = f"{path}.{name}" if path else name
                found.append(Slot(module, name, full_name, unshards.get(name)))
    return found


def expert_parameters(
    model: nn.Module, group: dist.ProcessGroup, params: Iterable[str] | None
) -> list[Slot]:
    """The whole parameters to shard; none if ``model`` is sharded over ``group`` already.

    Raises `ConfigurationError` if there are none otherwise, or one cannot be sharded.
    """
    present = slots(model)
    for slot in present:
        if slot.unshard is not None and slot.unshard.group_name != group.group_name:
            raise ConfigurationError(
                f"{slot.full_name} is sharded already, over process group "
                f"{slot.unshard.group_name!r} of {slot.unshard.group_size} ranks, and cannot be "
                f"sharded again over group {group.group_name!r}. Shard a model once, or build it "
                "anew to shard it over another group."
            )
    if params is not None:
        targets = _matching(present, tuple(params))
    elif any(slot.unshard for slot in present):
        targets = []
    else:
        targets = likely_experts(model)
        if not targets:
            raise ConfigurationError(
                f"shard_experts found no expert parameters in {type(model).__name__}: it looks for "
                "modules with num_experts, or 'expert' in their name, whose parameters all have "
                "the shape [experts, ...]. Name them with glob patterns on model.named_parameters"
                "(), such as params=['*.experts.*']; each must hold one expert per row. Or let "
                "moe_fx find them by what the model computes: "
                "params=moe_fx.explain(model, *example_args).expert_parameters."
            )
    for target in targets:
        _check(target, group)
    tied = {id(target.tensor) for target in targets}
    return [slot for slot in present if id(slot.tensor) in tied]


def _matching(present: Sequence[Slot], patterns: Sequence[str]) -> list[Slot]:
    parameters = [slot for slot in present if isinstance(slot.tensor, nn.Parameter)]
    for pattern in patterns:
        if not any(fnmatchcase(slot.full_name, pattern) for slot in parameters):
            raise ConfigurationError(
                f"No parameter's name matches {pattern!r}, given as params=. The patterns are "
                "globs on full parameter names as model.named_parameters() gives them, such as "
                f"{parameters[-1].full_name if parameters else 'experts.w1'!r}."
            )
    return [
        slot
        for slot in parameters
        if slot.unshard is None and any(fnmatchcase(slot.full_name, p) for p in patterns)
    ]


def likely_experts(model: nn.Module) -> list[Slot]:
    """Whole ``[E, ...]`` parameters of modules that look like a layer's experts."""
    found = []
    for path, module in model.named_modules():
        whole = {n: p for n, p in module._parameters.items() if n not in shards_of(module)}
        tables = {n: p for n, p in whole.items() if p is not None and p.ndim}
        sizes = {table.shape[0] for table in tables.values()}
        if len(sizes) != 1 or all(table.ndim != 3 for table in tables.values()):
            continue
        named_so = "expert" in f"{path} {type(module).__name__}".lower()
        if named_so or getattr(module, "num_experts", None) in sizes:
            prefix = f"{path}." if path else ""
            found += [Slot(module, name, prefix + name, None) for name in tables]
    return found


def _check(target: Slot, group: dist.ProcessGroup) -> None:
    table = target.tensor
    if type(table.data) is not Tensor:
        raise ConfigurationError(
            f"{target.full_name} is a {type(table.data).__name__}, and shard_experts cuts plain "
            "tensors. Shard the experts before anything else that changes parameters (FSDP, tensor "
            "parallelism, quantisation), or choose other parameters with params=."
        )
    experts = table.shape[0] if table.ndim else 0
    if not experts:
        raise ConfigurationError(
            f"{target.full_name} has the shape {list(table.shape)}, and there is nothing to share "
            "among ranks. Choose parameters of the shape [experts, ...] with params=."
        )
    check_device(table.device, target.full_name, group)
