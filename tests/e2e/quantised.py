"""A tensor subclass as quantisation libraries make them: integers and a scale inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Quantised(Tensor):
    """Stands for ``integers * scale``. A product with it is a plain tensor."""

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            integers.shape,
            strides=integers.stride(),
            dtype=scale.dtype,
            device=integers.device,
            requires_grad=False,
        )
        return made

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def of(cls, matrix: Tensor) -> Quantised:
        scale = matrix.abs().amax() / 127
        return cls((matrix / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return self.integers.to(self.scale.dtype) * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Quantised({self.integers!r}, {self.scale!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Quantised:
        return cls(inner["integers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.t.default):
            return cls(op(args[0].integers), args[0].scale)
        args, kwargs = pytree.tree_map_only(
            Quantised, Quantised.dequantised, (args, dict(kwargs or {}))
        )
        return op(*args, **kwargs)
