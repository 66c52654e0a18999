"""A rank's share of the weights, and all that is not shared, read from a safetensors checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_fx.errors import ConfigurationError
from moe_fx.weights.expert_parameters import Slot, slots
from moe_fx.weights.pretrained import is_pretrained, load_like
from moe_fx.weights.safetensors_file import open_safetensors
from moe_fx.weights.shards import as_shard, block


def read(
    model: nn.Module, group: dist.ProcessGroup, targets: Sequence[Slot], checkpoint: Path
) -> dict[str, Any]:
    """The checkpoint's tensors by `Slot.full_name`; of the experts only this rank's rows, also as a
    `DTensor`."""
    if not checkpoint.exists():
        raise ConfigurationError(
            f"There is no checkpoint at {checkpoint}. Give a safetensors file, or a directory that "
            "holds some."
        )
    cut = {target.full_name for target in targets}
    cut |= {slot.full_name for slot in slots(model) if slot.unshard is not None}
    if is_pretrained(model):
        loaded = load_like(model, group, cut, checkpoint)
        return {slot.full_name: slot.tensor for slot in slots(loaded)}
    return _read_safetensors(model, group, cut, checkpoint)


def _read_safetensors(
    model: nn.Module, group: dist.ProcessGroup, cut: set[str], checkpoint: Path
) -> dict[str, Tensor]:
    expected = {slot.full_name: slot for slot in slots(model) if slot.in_state_dict}
    with ExitStack() as stack:
        files = open_safetensors(checkpoint, stack)
        _check_names(model, expected, set(files), checkpoint)
        values: dict[int, Tensor] = {}
        for name in files:
            slot = expected[name]
            stored = files[name].get_slice(name)
            whole = list(slot.tensor.shape)
            if stored.get_shape() != whole:
                raise ConfigurationError(
                    f"{name} is {stored.get_shape()} in {checkpoint} and {whole} in the model. "
                    "Give the checkpoint of this very model, or build it with its configuration."
                )
            rows = block(whole[0], group) if name in cut else ...
            # The file stays mapped in memory for as long as a tensor shares its storage.
            values[id(slot.tensor)] = stored[rows].clone()
    return {
        name: values[id(slot.tensor)]
        for name, slot in expected.items()
        if id(slot.tensor) in values
    }


def _check_names(
    model: nn.Module, expected: Mapping[str, Slot], stored: set[str], checkpoint: Path
) -> None:
    read = {id(slot.tensor) for name, slot in expected.items() if name in stored}
    missing = sorted(name for name, slot in expected.items() if id(slot.tensor) not in read)
    unexpected = sorted(stored - set(expected))
    if missing or unexpected:
        raise ConfigurationError(
            f"The checkpoint {checkpoint} does not have the names of the model's state_dict(): "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}. Rename its tensors, or "
            "give the checkpoint of this very model."
        )
    lost = [s.full_name for s in slots(model) if s.tensor.is_meta and not s.in_state_dict]
    if lost:
        raise ConfigurationError(
            f"The model is on the meta device and no checkpoint holds its non-persistent buffers: "
            f"{_some(lost)}. Build these on a real device, or build the whole model there."
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "none"


def assign(model: nn.Module, weights: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Put ``weights`` into the model, which keeps its dtypes, ``requires_grad``, ties and device.

    On the meta device there is nothing to keep but a new `Parameter` can be put in place.
    """
    fresh: dict[int, nn.Parameter] = {}
    for slot in slots(model):
        if slot.full_name not in weights:
            continue
        weight, old = weights[slot.full_name], slot.tensor
        held = weight.to_local() if isinstance(weight, DTensor) else weight
        value = held.detach().to(held.device if old.is_meta else old.device, old.dtype)
        if not isinstance(old, nn.Parameter):
            slot.module._buffers[slot.name] = value
        elif not old.is_meta:
            _overwrite(old, value)
        else:
            if id(weight) not in fresh:
                fresh[id(weight)] = _parameter(value, slot, group)
                vars(fresh[id(weight)]).update({**vars(old), **vars(weight)})
            slot.module._parameters[slot.name] = fresh[id(weight)]


def _overwrite(old: Any, value: Tensor) -> None:
    if isinstance(old, DTensor):
        with torch.no_grad():
            old.to_local().copy_(value)
    else:
        old.data = value


def _parameter(value: Tensor, slot: Slot, group: dist.ProcessGroup) -> nn.Parameter:
    requires_grad = slot.tensor.requires_grad
    if slot.unshard is not None:
        return as_shard(value, slot.tensor.shape[0], group, requires_grad=requires_grad)
    return nn.Parameter(value, requires_grad=requires_grad)
