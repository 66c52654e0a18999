"""The gather that stands in for a whole expert parameter: once a forward, whatever reads it.

A sharded parameter is a `DTensor` (`moe_fx.weights.shards`) under the name it always had. Reading
the attribute gives the whole tensor. Entering the module that holds it gathers each of its shards,
leaving drops them. What the module returned depends on the gathers, so that every rank also meets
all of them in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from moe_fx.blocks import most_experts
from moe_fx.compat import all_gather_rows, traces_a_body
from moe_fx.errors import ConfigurationError
from moe_fx.weights.shards import load_whole

__all__ = ["Unshard", "install", "shards_of", "uninstall"]

_SHARDS = "_moe_fx_shards"  # of a module with shards: by name, how each is read


class Unshard:
    """``[n, ...] -> [E, ...]``: the shards of all ranks, in rank order; where the last ranks have
    fewer experts, filled up on the way."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        # The group's name: a model that holds the group itself could not be deep-copied.
        self.group_name = group.group_name
        self.group_size = group.size()
        self.gathered: Tensor | None = None  # set while the module that holds the parameter runs

    def read(self, shard: Any) -> Tensor:
        if self.gathered is not None:
            return self.gathered
        return self.gather(shard)

    def gather(self, shard: Any) -> Tensor:
        if not isinstance(shard, DTensor):
            raise ConfigurationError(
                f"A {type(shard).__name__} stands where a shard of experts, a DTensor, is due. "
                "Give torch.func.functional_call shards, such as those of model.named_parameters()."
            )
        rows, experts = shard.to_local(), shard.shape[0]
        missing = most_experts(experts, self.group_size) - rows.shape[0]
        if missing:
            rows = torch.constant_pad_nd(rows, [0] * (2 * rows.dim() - 1) + [missing])
        whole = all_gather_rows(rows, self.group_size, self.group_name)
        return whole if whole.shape[0] == experts else whole[:experts]


def shards_of(module: nn.Module) -> dict[str, Unshard]:
    """By name, how the shards among the module's own parameters are read."""
    found: dict[str, Unshard] = vars(module).get(_SHARDS, {})
    return found


def install(module: nn.Module, names: Sequence[str], group: dist.ProcessGroup) -> None:
    """Make each parameter, a `DTensor` of this rank's rows, read as all ranks' rows.

    Modules of one class go on sharing one, as Dynamo compiles equal layers once only if they do.
    """
    shards = shards_of(module) | {name: Unshard(group) for name in names}
    base = _BASES.get(type(module), type(module))
    key = base, frozenset(shards)
    if key not in _CLASSES:
        _CLASSES[key] = _class_with_shards(base, key[1])
        _BASES[_CLASSES[key]] = base
    vars(module)[_SHARDS] = shards
    module.__class__ = _CLASSES[key]


def uninstall(module: nn.Module) -> None:
    """Make the module's parameters, which are whole again, read as such."""
    del vars(module)[_SHARDS]
    module.__class__ = _BASES[type(module)]


_CLASSES: dict[tuple[type, frozenset[str]], type] = {}  # by class before, names of shards
_BASES: dict[type, type] = {}  # the class before


def _class_with_shards(base: Any, names: frozenset[str]) -> type:
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__delattr__": _delattr_of(base),
        "forward": _forward_of(base),
        "register_parameter": _register_parameter_of(base),
        "_load_from_state_dict": _load_of(base),
    }
    return type(base.__name__, (base,), members | {name: property(_reader(name)) for name in names})


def _reader(name: str) -> Callable[[Any], Tensor]:
    return lambda module: module._moe_fx_shards[name].read(module._parameters[name])


def _forward_of(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and traces_a_body():
            return base.forward(self, *args, **kwargs)  # a gather a read: as many on every rank
        gathered = _gather(self)
        try:
            output = base.forward(self, *args, **kwargs)
        finally:
            _drop(self)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return output
        return _reach(output, [whole for whole in gathered if whole.requires_grad])

    return forward


def _gather(module: Any) -> list[Tensor]:
    gathered = []
    for name, unshard in module._moe_fx_shards.items():
        unshard.gathered = unshard.gather(module._parameters[name])
        gathered.append(unshard.gathered)
    return gathered


def _drop(module: Any) -> None:
    for unshard in module._moe_fx_shards.values():
        unshard.gathered = None


def _register_parameter_of(base: Any) -> Callable[..., None]:
    """What ``module.w = nn.Parameter(...)`` calls."""

    @functools.wraps(base.register_parameter)
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name not in shards_of(self):
            base.register_parameter(self, name, param)
        elif isinstance(param, DTensor):
            self._parameters[name] = param
        else:
            raise ConfigurationError(
                f"{name} of {type(self).__name__} is sharded, and a {type(param).__name__} cannot "
                "take its place. Load whole weights with load_state_dict, which takes this rank's "
                "rows of them, or change the parameter before shard_experts."
            )

    return register_parameter


def _delattr_of(base: Any) -> Callable[..., None]:
    """What parametrisations, pruning, weight norm and adapters do first with a parameter."""

    @functools.wraps(base.__delattr__)
    def __delattr__(self: nn.Module, name: str) -> None:
        if name in shards_of(self):
            raise ConfigurationError(
                f"{name} of {type(self).__name__} is sharded, and what is to take its place (a "
                "parametrisation, pruning, an adapter on the experts' own parameters) would work "
                "on gathered weights that are not trained. Apply it to a model that is not "
                "sharded, with options={'ep_group': group} for expert parallelism, or to other "
                "parameters."
            )
        base.__delattr__(self, name)

    return __delattr__


def _load_of(base: Any) -> Callable[..., None]:
    @functools.wraps(base._load_from_state_dict)
    def _load_from_state_dict(
        self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
    ) -> None:
        errors: list[str] = rest[-1]
        for name in shards_of(self):
            full_name = prefix + name
            if full_name in state_dict:
                shard: Any = self._parameters[name]
                value = state_dict[full_name]
                try:
                    state_dict[full_name] = load_whole(full_name, value, shard)
                except ConfigurationError as error:
                    errors.append(str(error))
        base._load_from_state_dict(self, state_dict, prefix, *rest)

    return _load_from_state_dict


def _reach(output: Any, gathered: Sequence[Tensor]) -> Any:
    """``output``, with a backward that reaches every gather.

    A rank whose tokens hit no expert has an output that depends on no weight, and its backward
    would skip the reduce-scatter that the other ranks wait in. Costs a copy of the output. It saves
    a tensor, though an empty one: a checkpoint computes again only up to the last that was saved,
    and so, on every rank, through the gathers.
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
        ctx.save_for_backward(output.new_empty(0))
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert len(ctx.saved_tensors) == 1  # read, which is what makes a checkpoint compute again
        return (*grads, *[None] * ctx.num_gathered)
