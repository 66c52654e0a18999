"""Keep one rank's experts, compute as if all were here: the *gathered* program.

`shard_experts` cuts every expert parameter along its first dimension and puts the all-gather of the
shards over the group in its place: reading the parameter gives the whole tensor. So the model means
what it meant, in eager and under any compiler, and memory is what is saved at first.
``torch.compile(model, backend="moe_fx")`` then cancels the gathers and exchanges tokens instead.

One rule makes this safe whatever the experts' code does with its weights: *entering* the module
that holds them gathers each once, *leaving* drops them. A loop over the experts that were hit reads
its weights a different number of times on each rank; a gather a read would hang.

The gradient of a shard is the reduce-scatter of the whole tensor's gradients: summed, not averaged,
over the ranks. Autograd keeps the gathered weights until backward; gradient checkpointing, which
gathers them again, does not, and moe_fx's compiled graphs have none.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from moe_fx.compat import all_gather_rows
from moe_fx.errors import ConfigurationError
from moe_fx.groups import check_device, require_group

__all__ = ["expert_parameter_bytes", "shard_experts"]


def shard_experts(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    params: Iterable[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Keep this rank's block of every expert parameter; return the same model, same meaning.

    Every rank of the group calls this, and from then on runs the model together with the others.
    Rank r of W keeps the experts from ``r * E / W`` up to ``(r + 1) * E / W``: ``[E, ...]`` becomes
    ``[E / W, ...]``, a copy, so that the whole tensor is freed. The `Parameter` objects, their
    ``requires_grad`` and their ties stay; gradients they hold are dropped.

    group: the ranks that share the experts; default: all ranks.
    params: glob patterns on full parameter names (``"*.experts.w[123]"``). Default: every direct
        parameter of a module whose parameters all have the same first size E, one of them being
        three-dimensional, if the module's ``num_experts`` is E or its class or path says "expert".
    checkpoint: a safetensors file, or a directory of them, to load the weights from; of the experts
        only this rank's are read. A transformers model's is read with transformers' own
        conversions; any other must have the names of ``model.state_dict()``. The model may be on
        the meta device: its parameters are then new objects, so create the optimizer afterwards.

    A model that is already sharded over this group comes back unchanged, but for ``checkpoint``.
    Raises `ConfigurationError`, before anything is changed, if there is no process group, this rank
    is not in it, its backend cannot serve the model's device, no expert parameter is found, one
    does not divide by the group or is not a plain tensor, or the checkpoint does not fit the model.
    """
    group = require_group(group)
    targets = expert_parameters(model, group, params)
    weights = {} if checkpoint is None else _read(model, group, targets, Path(checkpoint))
    for param in {id(target.tensor): target.tensor for target in targets}.values():
        param.grad = None
        rows = param.data[block(param.shape[0], group)]
        param.data = rows.clone(memory_format=torch.contiguous_format)
    install(targets, group)
    _assign(model, weights)
    return model


def expert_parameter_bytes(model: nn.Module) -> tuple[int, int]:
    """(bytes of expert parameters this rank holds, bytes of all ranks' together).

    Equal for a model that is not sharded; its expert parameters are then those that `shard_experts`
    finds by default.
    """
    held: dict[int, int] = {}
    whole: dict[int, int] = {}
    for slot in slots(model):
        if slot.unshard is not None:
            held[id(slot.tensor)] = slot.tensor.nbytes
            whole[id(slot.tensor)] = slot.tensor.nbytes * slot.unshard.group_size
    for slot in _likely_experts(model):
        held[id(slot.tensor)] = whole[id(slot.tensor)] = slot.tensor.nbytes
    return sum(held.values()), sum(whole.values())


# ---- The gather, once a forward


class Unshard(nn.Module):
    """``[E / W, ...] -> [E, ...]``: the shards of all ranks, in rank order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        # The group's name: a model that holds the group itself could not be deep-copied.
        self.group_name = group.group_name
        self.group_size = group.size()
        self.gathered: Tensor | None = None  # set while the module that holds the parameter runs

    def forward(self, shard: Tensor) -> Tensor:
        if self.gathered is not None:
            return self.gathered
        return all_gather_rows(shard, self.group_size, self.group_name)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, group_name={self.group_name!r}"


def install(targets: Sequence[Slot], group: dist.ProcessGroup) -> None:
    """Make each target, a parameter that holds this rank's rows, read as all ranks' rows.

    Modules of one class go on sharing one, as Dynamo compiles equal layers once only if they do;
    so a parametrisation of such a module cannot be removed, or one added, for this module alone.
    """
    modules = {id(target.module): target.module for target in targets}.values()
    for module in modules:
        _unshare_class(module)
    for target in targets:
        parametrize.register_parametrization(
            target.module, target.name, Unshard(group), unsafe=True
        )
    for module in modules:
        _share_class(module)


_CLASSES: dict[tuple[type, frozenset[str]], type] = {}  # by class before, parametrised names


def _unshare_class(module: nn.Module) -> None:
    """Let ``register_parametrization``, which writes to a class, meet no other module's."""
    cls = type(module)
    if cls in _CLASSES.values():
        members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, members)


def _share_class(module: nn.Module) -> None:
    """Replace the class that ``register_parametrization`` made for ``module`` by a common one."""
    base = parametrize.type_before_parametrizations(module)
    parametrizations: Any = module.parametrizations
    names = frozenset(parametrizations)
    if (base, names) not in _CLASSES:
        own: Any = type(module)
        own.forward = _forward_of(base)
        for name in names:
            # Torch's property caches by the id of the module it was made for.
            setattr(own, name, property(_reader(name)))
        _CLASSES[base, names] = own
    module.__class__ = _CLASSES[base, names]


def _reader(name: str) -> Callable[[Any], Tensor]:
    return lambda module: module.parametrizations[name]()


def _forward_of(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gathered = _gather(self)
        try:
            output = base.forward(self, *args, **kwargs)
        finally:
            _drop(self)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return output
        return _reach(output, [whole for whole in gathered if whole.requires_grad])

    return forward


def _gather(module: nn.Module) -> list[Tensor]:
    gathered = []
    for unshard, shard in _sharded(module):
        unshard.gathered = all_gather_rows(shard, unshard.group_size, unshard.group_name)
        gathered.append(unshard.gathered)
    return gathered


def _drop(module: nn.Module) -> None:
    for unshard, _ in _sharded(module):
        unshard.gathered = None


def _sharded(module: nn.Module) -> list[tuple[Unshard, Tensor]]:
    """The gathers of ``module``'s own parameters, with the shards they gather."""
    parametrizations: Any = module.parametrizations
    return [
        (chain[0], chain.original)
        for chain in parametrizations.values()
        if isinstance(chain[0], Unshard)
    ]


def _reach(output: Any, gathered: Sequence[Tensor]) -> Any:
    """``output``, with a backward that reaches every gather.

    A rank whose tokens hit no expert has an output that depends on no weight, and its backward
    would skip the reduce-scatter that the other ranks wait in. Costs a copy of the output.
    """
    if not gathered:
        return output
    return pytree.tree_map_only(
        Tensor,
        lambda out: _DependsOn.apply(out, *gathered) if out.is_floating_point() else out,
        output,
    )


class _DependsOn(torch.autograd.Function):
    """The first argument, with the others in its backward, without gradients of its own."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *gathered: Tensor) -> Tensor:
        ctx.num_gathered = len(gathered)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, *[None] * ctx.num_gathered)


# ---- Which parameters


@dataclass(frozen=True)
class Slot:
    """``module.<name>``, a parameter or buffer of a model.

    full_name: what it is called in the model before sharding, ``"layers.0.experts.w1"``.
    unshard: what makes it whole, if it is this rank's shard.
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
        chain = isinstance(module, parametrize.ParametrizationList)
        unshard = module[0] if chain and isinstance(module[0], Unshard) else None
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full_name = f"{path}.{name}" if path else name
            if unshard is not None:  # "experts.parametrizations.w1.original"
                owner, _, parameter = path.rpartition("parametrizations.")
                full_name = owner + parameter
            found.append(Slot(module, name, full_name, unshard))
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
        targets = _likely_experts(model)
        if not targets:
            raise ConfigurationError(
                f"shard_experts found no expert parameters in {type(model).__name__}: it looks for "
                "modules with num_experts, or 'expert' in their name, whose parameters all have "
                "the shape [experts, ...]. Name them with glob patterns on model.named_parameters"
                "(), such as params=['*.experts.*']; each must hold one expert per row."
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


def _likely_experts(model: nn.Module) -> list[Slot]:
    """Whole ``[E, ...]`` parameters of modules that look like a layer's experts."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        tables = {n: p for n, p in module._parameters.items() if p is not None and p.ndim}
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
    if experts % group.size():
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigurationError(
            f"{target.full_name} has {experts} experts, which do not divide by the {group.size()} "
            "ranks of the group, and each rank must keep the same number of them. Use a group of "
            f"{', '.join(map(str, fitting))} ranks, or choose other parameters with params=."
        )
    check_device(table.device, target.full_name, group)


# ---- Which ranks


def block(experts: int, group: dist.ProcessGroup) -> slice:
    """The rows of ``[experts, ...]`` that this rank keeps."""
    here = experts // group.size()
    return slice(group.rank() * here, (group.rank() + 1) * here)


# ---- Weights from a checkpoint


def _read(
    model: nn.Module, group: dist.ProcessGroup, targets: Sequence[Slot], checkpoint: Path
) -> dict[str, Tensor]:
    """The checkpoint's tensors by `Slot.full_name`, of the experts only this rank's rows."""
    if not checkpoint.exists():
        raise ConfigurationError(
            f"There is no checkpoint at {checkpoint}. Give a safetensors file, or a directory that "
            "holds some."
        )
    cut = {target.full_name for target in targets}
    cut |= {slot.full_name for slot in slots(model) if slot.unshard is not None}
    if _is_pretrained(model):
        from moe_fx.integrations.transformers import load_like

        loaded = load_like(model, group, cut, checkpoint)
        return {slot.full_name: slot.tensor for slot in slots(loaded)}
    return _read_safetensors(model, group, cut, checkpoint)


def _is_pretrained(model: Any) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # no such model without it
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


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
            if slot.unshard is not None:
                whole[0] *= group.size()
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


def open_safetensors(checkpoint: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor in ``checkpoint``, a file or a directory."""
    from safetensors import safe_open

    index = checkpoint / "model.safetensors.index.json"
    if checkpoint.is_file():
        paths = [checkpoint]
    elif index.is_file():
        paths = [
            checkpoint / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        paths = sorted(checkpoint.glob("*.safetensors"))
    if not paths:
        raise ConfigurationError(
            f"{checkpoint} holds no safetensors files. Convert the checkpoint to safetensors "
            "(safetensors.torch.save_file); only these can be read a slice at a time."
        )
    files: dict[str, Any] = {}
    for path in paths:
        file = stack.enter_context(safe_open(path, framework="pt"))
        files.update(dict.fromkeys(file.keys(), file))
    return files


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


def _assign(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` into the model, which keeps its dtypes, ``requires_grad``, ties and device.

    On the meta device there is nothing to keep but a new `Parameter` can be put in place.
    """
    fresh: dict[int, nn.Parameter] = {}
    for slot in slots(model):
        if slot.full_name not in weights:
            continue
        weight, old = weights[slot.full_name], slot.tensor
        value = weight.detach().to(weight.device if old.is_meta else old.device, old.dtype)
        if not isinstance(old, nn.Parameter):
            slot.module._buffers[slot.name] = value
        elif not old.is_meta:
            old.data = value
        else:
            if id(weight) not in fresh:
                fresh[id(weight)] = nn.Parameter(value, requires_grad=old.requires_grad)
                vars(fresh[id(weight)]).update({**vars(old), **vars(weight)})
            slot.module._parameters[slot.name] = fresh[id(weight)]
