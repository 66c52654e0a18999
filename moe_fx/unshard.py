"""The gather that stands in for a whole expert parameter: once a forward, whatever reads it.

Entering a module gathers each of its sharded parameters, leaving drops them; what the module
returned depends on the gathers, so that every rank also meets all of them in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from moe_fx.compat import all_gather_rows, traces_a_body

if TYPE_CHECKING:
    from moe_fx.expert_parameters import Slot


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
