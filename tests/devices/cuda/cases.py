"""What the GPU's kernels are held to: the ATen kernels of the same ops, in float64.

``python -m tests.devices.cuda.cases --device cuda`` on a GPU; ``--device cpu`` with
``TRITON_INTERPRET=1``. Buffers that a kernel is to fill hold NaN before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import moe_fx  # noqa: F401  (registers the ops)
from moe_fx.ops.fused import ACTS, LAYOUTS
from tests.ops.test_fused_experts import layer

ops = torch.ops.moe_fx

GRADIENTS = (
    *("tokens", "weights", "gate_up", "up", "down"),
    *("gate_up_bias", "up_bias", "down_bias"),
)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
"""Of one token's gradient of weights four times that: it is one sum of terms of either sign."""


def to(device: str, arguments: list[Any]) -> list[Any]:
    return [each.to(device) if isinstance(each, Tensor) else each for each in arguments]


def wide(arguments: list[Any]) -> list[Any]:
    """On the host, in float64."""
    return [
        each.detach().cpu().double()
        if isinstance(each, Tensor) and each.is_floating_point()
        else each.cpu()
        if isinstance(each, Tensor)
        else torch.float64
        if isinstance(each, torch.dtype)
        else each
        for each in arguments
    ]


_share = (0, 1)
"""Which of how many shares of the layers this process tries."""


def shapes() -> Iterator[tuple[int, dict[str, Any]]]:
    """This process's, each with its number."""
    share, of = _share
    return ((at, each) for at, each in enumerate(_all_shapes()) if at % of == share)


def _all_shapes() -> Iterator[dict[str, Any]]:
    """Of layers: every layout and activation once, sizes that do not divide, no tokens, one
    expert for all, ids that are no expert's."""
    for at, layout in enumerate(LAYOUTS):
        yield {"layout": layout, "biased": at % 2 == 1, "transposed": at % 3 > 0}
    for act in ACTS:
        yield {"act": act, "layout": "single" if act == "relu2" else "halves"}
    yield {"layout": "interleaved", "biased": True, "clamped": True, "transposed": False}
    yield {"tokens": 70, "experts": 3, "top_k": 2, "hidden": 40, "inner": 24}
    yield {"tokens": 1, "top_k": 1}
    yield {"tokens": 33, "experts": 5, "top_k": 5, "weighted": False}
    yield {"tokens": 17, "missing": True, "biased": True}
    yield {"tokens": 9, "experts": 7, "top_k": 1, "missing": True, "layout": "separate"}
    yield {"tokens": 0}


def sizes(device: str, given: dict[str, Any]) -> dict[str, Any]:
    """Larger on a GPU, whose matmuls have tiles worth filling."""
    larger = {"tokens": 150, "hidden": 144, "inner": 96} if device == "cuda" else {}
    return {"tokens": 20, "hidden": 32, "inner": 48, **larger, **given}


def experts(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    from moe_fx.devices.cuda import experts as gpu
    from moe_fx.devices.cuda import launch

    dtypes = [torch.float32, torch.float16, torch.bfloat16]  # the last: not by the interpreter
    for at, given in shapes():
        for dtype in [dtypes[at % (3 if device == "cuda" else 2)]]:
            for name, way in some(ways(device, given, dtype), device, at, 2):
                launch._kinds.clear()
                for time in TIMES:
                    arguments = inputs(device, given, dtype, at + time)
                    with poisoned(), mock.patch.object(gpu, "choose", way):
                        out = gpu.forward(*to(device, arguments))
                    expected = ops.fused_experts(*wide(arguments))
                    yield f"{given} {dtype} {name} {time}", out, expected
                assert all(launch._kinds.values()), (given, name)


TIMES = (0, 100)
"""First, and again as it was recorded, with other values."""


def inputs(device: str, given: dict[str, Any], dtype: torch.dtype, seed: int) -> list[Any]:
    arguments = layer(**sizes(device, given), dtype=dtype, seed=seed)
    if given.get("tokens") == 33:
        arguments[1][:] = torch.tensor([4])  # one expert for all
    return arguments


def ways(
    device: str, given: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every kernel that takes the layer: what stands in for `choice.choose`."""
    from moe_fx.devices.cuda.choice import GROUPED
    from moe_fx.devices.cuda.kernels.tiles import Tiles
    from moe_fx.devices.cuda.layer import Layer

    shape = Layer(*to(device, inputs(device, given, dtype, 0))).shape
    ups = [Tiles(32, 64, 32, 4, 4, 2)]
    if device == "cuda":
        ups += [Tiles(16, 16, 16, 1, 4, 2), Tiles(128, 64, 64, 8, 4, 3)]
    downs: list[Any] = list(ups)
    if shape.described:
        described = Tiles(32, 32, 16, 8, 4, 2, described=True)
        downs += [described, Tiles(32, 32, 32, 8, 4, 2, described=True, rest=16)]
        if not shape.alternates:
            ups.append(described)
            ups.append(Tiles(64, 32, 32, 2, 4, 2, described=True, gathered=True, rest=16))
    if shape.joinable:
        joined = {"described": True, "joined": True}
        ups.append(Tiles(32, 16, 32, 4, 4, 2, **joined, rest=16))
        ups.append(Tiles(64, 32, 16, 4, 4, 2, **joined, gathered=True))
        if device == "cuda":
            large = [Tiles(16, 64, 64, 1, 4, 4, **joined), Tiles(128, 128, 64, 8, 8, 3, **joined)]
            ups += large if dtype.itemsize == 2 else large[:1]  # as much memory as there is
    if shape.layout == "interleaved":
        ups.append(Tiles(32, 16, 32, 4, 4, 2, joined=True))
    grouped = [GROUPED] if (shape.grouped if device == "cuda" else shape.described) else []
    ups, downs = [*ups, *grouped], [*downs, *grouped]
    for at, up in enumerate(ups):
        down = downs[at % len(downs)]

        def choose(matmul: str, *others: Any, at: int = at, up: Any = up, down: Any = down) -> Any:
            if matmul.startswith("gradient"):
                *_, offered, _ = others
                return offered[at % len(offered)]
            return up if matmul.startswith("gate_up") else down

        yield f"{up} {down}", choose


def some(all_of: Iterator[Any], device: str, at: int, count: int) -> list[Any]:
    """On a CPU so many, others for each ``at``: the interpreter takes long."""
    items = list(all_of)
    if device == "cuda":
        return items
    return [items[(at + each * 2) % len(items)] for each in range(min(count, len(items)))]


def training(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    from moe_fx.devices.cuda import backward as back
    from moe_fx.devices.cuda import experts as gpu
    from moe_fx.devices.cuda import launch

    for at, given in shapes():
        dtype = [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16][at % 2]
        if given.get("clamped"):  # near the limit, rounded columns have gradients or have none
            dtype = torch.float32
        for name, way in some(ways(device, given, dtype), device, at, 1):
            launch._kinds.clear()
            for time in TIMES:
                arguments = inputs(device, given, dtype, at + time)
                whole, here = wide(arguments), to(device, arguments)
                drawn = torch.Generator().manual_seed(at + time)
                size = len(whole[0]), whole[5].shape[2]
                grad = torch.randn(size, dtype=torch.float64, generator=drawn)
                needed = [each is not None for at, each in enumerate(whole[:9]) if at != 1]
                with (
                    poisoned(),
                    mock.patch.object(gpu, "choose", way),
                    mock.patch.object(back, "choose", way),
                ):
                    result, *kept = gpu.forward_training(*here)
                    grads = back.backward(grad.to(device, dtype), *kept, *here, needed)
                expected, *kept = ops.fused_experts_training(*whole)
                backward = ops.fused_experts_backward(grad, *kept, *whole, needed)
                of = f"{given} {dtype} {name} {time}"
                yield f"{of} result", result, expected
                for which, made, right in zip(GRADIENTS, grads, backward, strict=True):
                    yield f"{of} gradient of {which}", made, right
                for made, table in ((grads[2], here[3]), (grads[4], here[5])):
                    assert made.stride() == table.stride(), given
            assert all(launch._kinds.values()), (given, name)


def sorting(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    from moe_fx.devices.cuda.kernels import sort

    for tokens, k, count in ((1, 1, 1), (7, 3, 5), (400, 4, 60), (4200, 2, 128)):
        ids = torch.randint(-1, count + 1, (tokens, k))
        order, row_map, ends = (each.cpu() for each in sort.sort_pairs(ids.to(device), count))
        flat = ids.reshape(-1)
        kept = (flat >= 0) & (flat < count)
        right = torch.argsort(torch.where(kept, flat, count), stable=True)
        total = int(kept.sum())
        counts = torch.bincount(flat[kept], minlength=count)
        yield f"{tokens}x{k} of {count} order", order[:total], right[:total]
        yield f"{tokens}x{k} of {count} ends", ends, counts.cumsum(0)
        places = torch.full_like(flat, -1)
        places[right[:total]] = torch.arange(total)
        yield f"{tokens}x{k} of {count} row_map", row_map, places
        again = sort.inverse(order.to(device), ends.to(device)).cpu()
        yield f"{tokens}x{k} of {count} inverse", again, places


def gating(device: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    from moe_fx.devices.cuda.kernels.gate import gate

    routers = [
        (8, 2, "softmax", False, 1, 1, "top2", 0.0, 1.0),
        (60, 4, "softmax", False, 1, 1, "top2", 0.0, 1.0),
        (128, 8, "softmax", True, 1, 1, "top2", 0.0, 1.0),
        (256, 8, "sigmoid", True, 8, 4, "top2", 1e-20, 2.5),
        (32, 3, "softmax", False, 4, 2, "max", 0.0, 16.0),
        (512, 10, "sigmoid", False, 1, 1, "top2", 1e-20, 1.0),
        (5, 5, "sigmoid", True, 1, 1, "top2", 1e-20, 1.0),
    ]
    for count, k, score, biased, *rest in routers:
        for tokens, dtype in ((1, torch.float32), (37, torch.bfloat16)):
            spread = torch.linspace(-3, 3, count)  # no two are equal, in bfloat16 neither
            logits = torch.stack([spread[torch.randperm(count)] for _ in range(tokens)]).to(dtype)
            bias = torch.randn(count) if biased else None
            right = ops.gating_top_k(logits.double(), k, score, bias, *rest)
            made = gate(
                logits.to(device), k, score, None if bias is None else bias.to(device), *rest
            )
            rank = right[0].sort(descending=True).values
            yield (
                f"{count} {score} {rest} weights",
                made[0].cpu().sort(descending=True).values,
                rank,
            )
            scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
            mine = scores.gather(1, made[1].cpu())
            yield f"{count} {score} ids", mine, scores.gather(1, right[1])
    logits = torch.randn(4, 8)
    logits[2] = float("nan")
    weights, ids = gate(logits.to(device), 2, "softmax", None, 1, 1, "top2", 0.0, 1.0)
    yield "NaN: ids", ids.clamp(0, 7), ids
    yield "NaN: weights", weights.isnan().any(1).cpu(), torch.tensor([False, False, True, False])


def poisoned() -> Any:
    """What is not written is NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    return _Deterministic()


class _Deterministic:
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


CASES: dict[str, Callable[[str], Iterator[tuple[str, Tensor, Tensor]]]] = {
    "sorting": sorting,
    "gating": gating,
    "experts": experts,
    "training": training,
}


def wrong(kind: str, device: str) -> Iterator[tuple[str, float | None]]:
    """Every comparison, with its difference if that is too large."""
    for name, made, right in CASES[kind](device):
        allowed = TOLERANCE.get(made.dtype, 0.0) * (4 if made.numel() == 1 else 1)
        off = difference(made, right)
        yield name, None if off <= allowed else off


def difference(made: Tensor, right: Tensor) -> float:
    """Relative; NaN: infinite."""
    made, right = made.detach().double().cpu(), right.detach().double().cpu()
    if made.shape != right.shape:
        return float("inf")
    if not made.numel():
        return 0.0
    size = float(right.norm())
    off = float((made - right).norm())
    return off / size if size and off == off else (0.0 if off == 0 else float("inf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--share", default="0/1", help="1/4: the second quarter of the layers, of four processes"
    )
    parser.add_argument("kinds", nargs="*", default=list(CASES))
    given = parser.parse_args()
    global _share
    share, _, of = given.share.partition("/")
    _share = (int(share), int(of))
    from tests.devices.cuda.interpreted import recorded_here

    bad = count = 0
    with recorded_here() if given.device == "cpu" else nullcontext():
        for kind in given.kinds:
            for name, off in wrong(kind, given.device):
                count += 1
                if off is not None:
                    bad += 1
                    print(f"{kind}: {name}: {off:.2e}")
    print(f"{count} compared, {bad} wrong")
    sys.exit(1 if bad or not count else 0)


if __name__ == "__main__":
    main()
