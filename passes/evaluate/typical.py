"""Values that are typical of what an input of a graph can hold: what proofs are run on.

Contract. ``drawn(node, sizes, seed)`` gives the same value for the same arguments. It is never
constant where it has two entries or more, so that nothing that reads it can be zero, or the same
for all rows, by the choice of values alone:

- bools have both values;
- integers lie in the range that their use allows (`uses.py`): ids below the number of experts,
  quantised weights and packed bits over the range of their dtype, others a few small numbers, and
  what they are compared with among them;
- integers whose bits are floats hold finite ones;
- floats are normal; where they divide, scale or are rooted, positive and away from 0 and 1;
- a scalar is what it was when the graph was captured; a changed float is much less or more, since
  it may be a limit that values seldom reach;
- a constant of the graph is what it is, and what is known of an input when the graph was captured
  (``meta["real"]``: of integers, bools and masks) is drawn from: its own entries, in another order.
  One in three changes of integers is to any that their use allows: a map of ids need not stay one
  to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import value
from moe_fx.passes.evaluate.uses import Uses, uses_of

Kind = Literal["bools", "integers", "floats", "scalar", "constant", "size"]

_DENSE_LIMIT = 1 << 20
_STEP = 257
_SCALAR = 1.5
_AGAIN = 101
_TINY = 1e-2
_LARGEST = 1 << 62


def kind_of(node: Node) -> Kind:
    val = value(node)
    if node.op == "get_attr":
        return "constant"
    if isinstance(val, torch.SymFloat):
        return "scalar"
    if not isinstance(val, Tensor):
        return "size"
    if val.dim() == 0 and val.is_floating_point():
        return "scalar"
    if val.dtype == torch.bool:
        return "bools"
    return "floats" if val.is_floating_point() or val.is_complex() else "integers"


def scalar(node: Node) -> float:
    """The value the model's float behind ``node`` had when the graph was captured."""
    source = node.args[0] if node.target is torch.ops.aten.item.default else node
    assert isinstance(source, Node)
    return float(source.meta.get("scalar", _SCALAR))


def drawn(
    node: Node,
    sizes: Sequence[int],
    seed: int,
    *,
    again: int = 0,
    own: bool = False,
    weight: bool = False,
) -> Any:
    """A value for what ``node`` stands for; ``sizes``: of a tensor. again: not 0 for another value
    than that, with ``seed``. own: what is known of it as it was when the graph was captured, where
    the sizes are those. weight: if it is a matrix that
    takes part in a matmul, such that products are as large as what it multiplies."""
    val = value(node)
    if isinstance(val, torch.SymFloat):
        return _scalar(node, again)
    if not isinstance(val, Tensor):
        return val
    if node.op == "get_attr":
        return constant_of(node)
    real = node.meta.get("real")
    if own and real is not None and list(real.shape) == list(sizes):
        return real.clone()
    seed += _AGAIN * again
    generator = torch.Generator().manual_seed(seed)
    if val.dim() == 0 and val.is_floating_point():
        return torch.tensor(_scalar(node, again), dtype=val.dtype)
    uses = uses_of(node)
    if real is not None and val.dim() == 0:
        return _another(real, again, uses) if again else real.clone()
    if real is not None and len(real.unique()) > 1 and (again % 3 != 1 or real.is_floating_point()):
        return _reordered(real, sizes, generator)
    if val.dtype == torch.bool:
        made = torch.rand(list(sizes), generator=generator) < 0.5
        return _with_both(made, seed, again)
    if val.is_complex():
        return torch.randn(list(sizes), dtype=val.dtype, generator=generator)
    if val.is_floating_point():
        made = _floats(list(sizes), val.dtype, uses, generator)
        shrunk = weight and uses.multiplied and len(sizes) > 1 and val.dtype.itemsize > 1
        return _scaled(made, max(1, sizes[-1]) ** -0.5) if shrunk else made
    return _integers(list(sizes), val.dtype, uses, generator, real)


def random_tensor(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal. Large tensors are overlapping windows of a small random one: no memory, distinct
    entries."""
    if math.prod(sizes) <= _DENSE_LIMIT:
        return torch.randn(sizes, generator=generator).to(dtype)
    return _windows(sizes, lambda extent: torch.randn(extent, generator=generator).to(dtype))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """``tensor`` times ``factor``; one of overlapping windows stays such."""
    if tensor.is_contiguous():
        return tensor * factor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.as_strided([extent], [1]) * factor).as_strided(tensor.shape, tensor.stride())


def _windows(sizes: list[int], base_of: Any) -> Tensor:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * (_STEP if strides[0] == 1 else 13) + size % 7)
    extent = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    windows: Tensor = base_of(extent).as_strided(sizes, strides)
    return windows


def _scalar(node: Node, again: int) -> float:
    """The value at capture; changed, much less, or more: of what is next to nothing (a norm's
    epsilon) half of one."""
    number, way = scalar(node), again % 3
    if way == 0:
        return number
    if not number or (way == 2 and abs(number) < _TINY):
        return 0.5
    return number * (0.06 if way == 1 else 3.0)


def _another(real: Tensor, again: int, uses: Uses) -> Tensor:
    """Of one integer or bool. A number may be a limit that all on this rank are below, or above:
    so it is less at first, then more, then 0."""
    if real.dtype == torch.bool:
        return ~real
    number, info = int(real), torch.iinfo(real.dtype)
    others = [
        n
        for n in (number // 2, number + 1, 0, number + 2)
        if n != number and info.min <= n <= info.max and not (uses.positive and n == 0)
    ]
    return torch.tensor(others[(again - 1) % len(others)], dtype=real.dtype)


def constant_of(node: Node) -> Any:
    """What a ``get_attr`` node reads."""
    owner: Any = node.graph.owning_module
    assert owner is not None
    for name in str(node.target).split("."):
        owner = getattr(owner, name)
    return owner.detach().cpu() if isinstance(owner, Tensor) else owner


def _reordered(real: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    flat, count = real.reshape(-1), math.prod(sizes)
    order = torch.randperm(len(flat), generator=generator)
    if count > len(flat):
        order = torch.cat(
            [order, torch.randint(len(flat), (count - len(flat),), generator=generator)]
        )
    made = flat[order[:count]]
    if count > 1 and bool((made == made[0]).all()):
        made[-1] = flat[flat != made[0]][0]
    return made.reshape(list(sizes))


def _with_both(made: Tensor, seed: int, again: int) -> Tensor:
    """``made`` with both values, in other places for another seed; one entry: true, or changed."""
    flat = made.reshape(-1)
    if len(flat) == 1:
        flat[0] = again % 2 == 0
    elif len(flat):
        flat[seed % len(flat)] = False
        flat[(seed + 1) % len(flat)] = True
    return flat.reshape(made.shape)


def _floats(sizes: list[int], dtype: torch.dtype, uses: Uses, generator: torch.Generator) -> Tensor:
    if uses.scales is not None or uses.positive:
        most = uses.scales or 1.0

        def positive(extent: Any) -> Tensor:
            spread = torch.rand(extent, generator=generator)
            away = torch.where(spread < 0.5, 0.3 + spread, 0.8 + spread)  # 0.3-0.8 or 1.3-1.8
            return (away / most).to(dtype)

        return positive(sizes) if math.prod(sizes) <= _DENSE_LIMIT else _windows(sizes, positive)
    made = random_tensor(sizes, dtype, generator)
    if not uses.compared or not made.numel() or not made.is_contiguous():
        return made
    return _sprinkled(made, uses.compared, generator)


def _integers(
    sizes: list[int],
    dtype: torch.dtype,
    uses: Uses,
    generator: torch.Generator,
    real: Tensor | None,
) -> Tensor:
    info = torch.iinfo(dtype)
    whole = info.bits == 8 or (uses.bits and uses.below is None)
    if uses.below is not None:
        low, high = 0, uses.below
    elif whole:
        low, high = max(info.min, -_LARGEST), min(info.max, _LARGEST) + 1
    elif uses.compared:
        low, high = int(min(uses.compared)) - 1, int(max(uses.compared)) + 2
    elif real is not None and real.numel():
        low, high = int(real.min()), int(real.max()) + 1
    else:
        low, high = 0, 4
    low, high = max(low, info.min), min(high, info.max + 1)

    def numbers(extent: Any) -> Tensor:
        return torch.randint(
            low, high, extent if isinstance(extent, list) else [extent], generator=generator
        ).to(dtype)

    def bits(extent: Any) -> Tensor:
        wanted = [extent] if isinstance(extent, int) else extent
        assert uses.viewed is not None
        count = math.prod(wanted) * dtype.itemsize // uses.viewed.itemsize
        floats = torch.randn(count, generator=generator).to(uses.viewed)
        return floats.view(dtype).reshape(wanted)

    if uses.viewed is not None:
        small = math.prod(sizes) <= _DENSE_LIMIT
        return bits(sizes) if small else _windows(sizes, bits)
    if math.prod(sizes) > _DENSE_LIMIT:
        return _windows(sizes, numbers)
    made = numbers(sizes)
    if whole and uses.below is None:
        made = _sprinkled(made, uses.compared | {0.0, 1.0}, generator)
    return _not_constant(made, low, high)


def _sprinkled(made: Tensor, numbers: set[float], generator: torch.Generator) -> Tensor:
    """Half of the entries replaced by ``numbers``."""
    among = torch.tensor(sorted(numbers)).to(made.dtype)
    picked = among[torch.randint(len(among), made.shape, generator=generator)]
    return torch.where(torch.rand(made.shape, generator=generator) < 0.5, picked, made)


def _not_constant(made: Tensor, low: int, high: int) -> Tensor:
    flat = made.reshape(-1)
    if len(flat) > 1 and high - low > 1 and bool((flat == flat[0]).all()):
        flat[-1] = low if int(flat[0]) != low else low + 1
    return flat.reshape(made.shape)
