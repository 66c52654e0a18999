"""transformers' models: loaded a shard at a time, and saved whole.

`sharded_loading` loads only this rank's experts with transformers' own loader. The loader reads a
checkpoint tensor straight into a parameter's layout, stacking experts that are stored one by one,
and for a parameter that is a DTensor reads only the local shard. So during `sharded_loading` the
expert parameters are DTensors, cut along the experts, from just before the weights are read until
just after transformers has finished them (missing keys, ties); then they become what
`shard_experts` makes of them.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moe_fx.blocks import block_of
from moe_fx.errors import ConfigurationError
from moe_fx.ranks.groups import check_device, require_group
from moe_fx.weights import streaming
from moe_fx.weights.data_parallel import leave_nothing, leave_to_shards
from moe_fx.weights.expert_parameters import Slot, expert_parameters
from moe_fx.weights.safetensors_file import open_safetensors
from moe_fx.weights.shards import as_shard, block
from moe_fx.weights.unshard import install
from moe_fx.weights.whole import full_state_dict, meet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("moe_fx")

_SAVING_BEGINS = 300.0
_SAVING = 3600.0  # seconds that a rank waits until rank 0 has written a checkpoint


def is_pretrained(model: Any) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # no such model without it
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def read_whole(targets: Sequence[Slot], group: dist.ProcessGroup) -> None:
    """Make each target, which is a shard, read as the whole."""
    names: dict[nn.Module, list[str]] = {}
    for target in targets:
        names.setdefault(target.module, []).append(target.name)
    for module, of_module in names.items():
        install(module, of_module, group)


def adapt(model: nn.Module) -> None:
    """Let DDP and ``save_pretrained``, which know nothing of shards, treat those of ``model`` as
    what they are."""
    leave_to_shards(model)
    if is_pretrained(model):
        save_whole(model)


def readapt(model: nn.Module) -> None:
    """`adapt` undone: there are no shards any more."""
    leave_nothing(model)
    for module in model.modules():
        saving = vars(module).get("save_pretrained")
        if isinstance(saving, partial) and saving.func is _save_pretrained:
            del vars(module)["save_pretrained"]


@contextmanager
def sharded_loading(
    group: dist.ProcessGroup | None = None, *, params: Iterable[str] | None = None
) -> Iterator[None]:
    """Within it, ``from_pretrained`` gives a model sharded as by `shard_experts`.

    Of the experts, a rank reads and holds only its own (of safetensors checkpoints; a ``.bin`` file
    can only be read whole). ``group`` and ``params`` as for `shard_experts`, whose errors
    ``from_pretrained`` then raises; also `ConfigurationError` for a model that is quantised on
    load. Changes `transformers.PreTrainedModel` for the time being: not for concurrent threads.
    """
    from transformers import PreTrainedModel

    group = require_group(group)
    patterns = None if params is None else tuple(params)
    load = PreTrainedModel._load_pretrained_model
    finish = PreTrainedModel._finalize_model_loading
    placed: list[Slot] = []

    def load_shards(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(load).bind(model, *args, **kwargs).arguments
        placed[:] = expert_parameters(model, group, patterns)
        _place(placed, group, arguments["load_config"])
        return load(model, *args, **kwargs)

    def finish_shards(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = finish(model, *args, **kwargs)
        read_whole(placed, group)
        adapt(model)
        placed.clear()
        return result

    PreTrainedModel._load_pretrained_model = staticmethod(load_shards)  # type: ignore[method-assign]
    PreTrainedModel._finalize_model_loading = staticmethod(finish_shards)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(load)  # type: ignore[method-assign]
        PreTrainedModel._finalize_model_loading = staticmethod(finish)  # type: ignore[method-assign]


def _place(targets: list[Slot], group: dist.ProcessGroup, load_config: Any) -> None:
    """Make each target, whole and on meta, a DTensor cut along the experts."""
    if load_config.hf_quantizer is not None:
        raise ConfigurationError(
            "sharded_loading does not load quantised models: the experts' packed layout is the "
            "quantiser's own. Load the model whole, or load it without quantization_config."
        )
    sharded: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for target in targets:
        whole = target.tensor
        ranks, experts = group.size(), whole.shape[0]
        if not block_of(ranks - 1, experts, ranks):
            raise ConfigurationError(
                f"{target.full_name} has {experts} experts, of which the last of {ranks} ranks "
                "would have none, and transformers' loader cannot read none. Load the model whole "
                "and call moe_fx.shard_experts, or use fewer ranks."
            )
        if id(whole) not in sharded:
            device = _device(load_config.device_map, target.full_name)
            check_device(device, target.full_name, group)
            rows = torch.empty_like(whole[block(whole.shape[0], group)], device="meta")
            sharded[id(whole)] = as_shard(
                rows, whole.shape[0], group, requires_grad=whole.requires_grad, device=device.type
            )
        target.module._parameters[target.name] = sharded[id(whole)]


def _device(device_map: Any, name: str) -> torch.device:
    """Where ``device_map``, transformers' final one, puts the parameter ``name``."""
    while device_map is not None:
        if name in device_map:
            if device_map[name] == "disk":
                raise ConfigurationError(
                    f"device_map puts {name} on disk, and a sharded expert parameter must be in "
                    "memory. Use a device_map without disk offload, or more ranks."
                )
            device = device_map[name]
            return torch.device(device)
        if not name:
            break
        name = name.rpartition(".")[0]
    return torch.device("cpu")


def load_like(
    model: Any,
    group: dist.ProcessGroup,
    names: Iterable[str],
    checkpoint: str | os.PathLike[str],
) -> PreTrainedModel:
    """A model like ``model``, a transformers one, loaded from ``checkpoint``; ``names`` sharded.

    Raises `ConfigurationError` if the checkpoint lacks weights of the model.
    """
    path = Path(checkpoint)
    device = model.device
    options: dict[str, Any] = {"config": model.config, "dtype": model.dtype}
    if device.type not in ("cpu", "meta"):
        options["device_map"] = {"": device}
    with sharded_loading(group, params=names), ExitStack() as stack:
        if path.is_file():
            files = open_safetensors(path, stack)
            options["state_dict"] = {key: file.get_slice(key) for key, file in files.items()}
        loaded, info = type(model).from_pretrained(
            None if path.is_file() else path, output_loading_info=True, **options
        )
    if info["missing_keys"]:
        raise ConfigurationError(
            f"The checkpoint {path} lacks weights of {type(model).__name__}: "
            f"{', '.join(sorted(info['missing_keys'])[:8])}. Give a checkpoint of this very model; "
            "transformers would fill the missing ones with random numbers."
        )
    return loaded


def save_whole(model: Any) -> None:
    """Let ``save_pretrained`` of ``model``, and of transformers models within it, write the whole.

    Every rank calls it, as `full_state_dict`; rank 0 writes, a block of experts at a time where it
    can (`moe_fx.weights.streaming`). It returns when the files are there.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = partial(_save_pretrained, module)  # type: ignore[method-assign]


def _save_streaming(model: Any, save: Any, arguments: inspect.BoundArguments) -> bool:
    """False, on every rank, where the state dict must be put together first."""
    arguments.apply_defaults()
    given: dict[str, Any] = arguments.arguments
    wanted = ("state_dict", "push_to_hub", "variant", "distributed_checkpoint")
    if any(given.get(name) for name in wanted):
        return False
    if getattr(model, "hf_quantizer", None) or getattr(model, "_hf_peft_config_loaded", False):
        return False
    original = given.get("save_original_format", True)
    try:
        tables = streaming.plan(model, original)
    except streaming.Unfit as reason:
        log.info("save_pretrained puts the whole model together on rank 0: %s", reason)
        return False
    meet("save a model (save_pretrained)", _SAVING_BEGINS)

    def rest(folder: Path, dense: dict[str, Any]) -> None:
        given.update(save_directory=folder, state_dict=dense)
        save(*arguments.args, **arguments.kwargs)

    target = Path(given["save_directory"]) if given.get("is_main_process", True) else None
    size = given.get("max_shard_size", "50GB")
    streaming.save(model, tables, original, target, size, rest)
    meet("finish save_pretrained", _SAVING)
    return True


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> None:
    save = type(model).save_pretrained
    arguments = inspect.signature(save).bind(model, *args, **kwargs)
    if _save_streaming(model, save, arguments):
        return
    given = arguments.arguments.get("state_dict")
    if given is None:
        whole = full_state_dict(model)
    else:
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in given.items()}
    main = arguments.arguments.get("is_main_process", True) and dist.get_rank() == 0
    arguments.arguments |= {"state_dict": whole, "is_main_process": main}
    save(*arguments.args, **arguments.kwargs)
    meet("finish save_pretrained", _SAVING)
