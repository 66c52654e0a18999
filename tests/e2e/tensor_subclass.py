"""A traceable tensor subclass such as quantisation libraries make: two plain tensors inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Halved(Tensor):
    """Holds half of what it stands for, twice: ``one + two``. Any op makes it whole first."""

    one: Tensor
    two: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor) -> Halved:
        return cls.of(whole / 2, whole / 2)

    @classmethod
    def of(cls, one: Tensor, two: Tensor) -> Halved:
        made: Halved = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, one.shape, dtype=one.dtype, device=one.device, requires_grad=False
        )
        made.one, made.two = one, two
        return made

    def __init__(self, whole: Tensor) -> None:
        pass

    def whole(self) -> Tensor:
        return self.one + self.two

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Halved:
        return cls.of(inner["one"], inner["two"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            return cls.of(op(args[0].one), op(args[0].two))
        if op is torch.ops.aten.mul.Tensor and not isinstance(args[1], Tensor):
            return cls.of(op(args[0].one, args[1]), op(args[0].two, args[1]))
        args, kwargs = pytree.tree_map_only(Halved, Halved.whole, (args, kwargs or {}))
        return op(*args, **kwargs)
