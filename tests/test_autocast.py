"""What is captured under autocast computes what ``aot_eager`` computes of it, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from moe_fx.autocast import switch_off
from moe_fx.capture import capture
from moe_fx.compat import base_compiler

BF16 = torch.bfloat16
_generator = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator) / 4


GATE, W1, W2, PROJ = _random(4, 32), _random(4, 32, 32), _random(4, 32, 32), _random(32, 32)
X, Y, IMAGE, KERNEL = _random(12, 32), _random(12, 32), _random(2, 3, 8, 8), _random(4, 3, 3, 3)
CELL = nn.MultiheadAttention(32, 4, batch_first=True)


@torch.library.custom_op("moe_fx_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


doubled.register_autograd(lambda context, gradient: gradient * 2)
doubled.register_autocast("cpu", BF16)


class Squared(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x @ x.t()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient @ x + gradient.t() @ x


def routed(x: Tensor, proj: Tensor) -> Any:
    y = (x @ proj).float()
    w, ids = torch.softmax(x @ GATE.t(), -1).topk(2)
    h = torch.relu(torch.einsum("th,tkhi->tki", x, W1[ids]))
    return y + 300.0 - 300.0, (torch.einsum("tki,tkih->tkh", h, W2[ids]) * w[..., None]).sum(1)


def off_inside(x: Tensor, proj: Tensor) -> Any:
    low = x @ proj
    with torch.autocast("cpu", enabled=False):
        full = low.float() @ proj
    return low, full, full @ proj


def other_dtype_inside(x: Tensor, proj: Tensor) -> Any:
    with torch.autocast("cpu", torch.float16):
        half = x @ proj
        with torch.autocast("cpu", BF16):
            brain = x @ proj
        again = half @ proj
    return half, brain, again


def einsums(x: Tensor, proj: Tensor) -> Any:
    one_hot = torch.einsum("te,th->eht", F.one_hot(torch.arange(12) % 4, 4).float(), x)
    outer = torch.einsum("ti,tj->tij", x, x)  # no matmul: not cast
    return one_hot, outer, torch.einsum("ti,jk->tj", x, proj), torch.einsum("ti->i", x)


def mixed_dtypes(x: Tensor, proj: Tensor) -> Any:
    low = x @ proj
    put = torch.zeros_like(low).index_put((torch.arange(12),), low)
    added = torch.zeros_like(low).scatter_add(0, torch.zeros(12, 32).long(), low)
    both = torch.cat([low, x]), torch.stack([low, x]), torch.addcmul(x, low, low)
    return put, added, *both, torch.where(x > 0, x, low), x + low, low * 2


def in_place(x: Tensor, proj: Tensor) -> Any:
    low, other = x @ proj, x @ proj
    low.pow_(2).add_(1).log_()
    other[1:3] = x[1:3]
    other.index_put_((torch.arange(3),), low[:3]).exp_()
    total = torch.zeros(12, 32).index_add_(0, torch.arange(12), x).addmm_(x, proj)
    return low, other, total.cumsum_(0)


def in_full_precision(x: Tensor, proj: Tensor) -> Any:
    low = x @ proj
    norms = F.layer_norm(low, (32,)), F.rms_norm(low, (32,)), low.norm(), low.rsqrt()
    return *norms, low.softmax(-1), low.softmax(-1, dtype=torch.float32), low.exp(), low.sum(0)


def composed(x: Tensor, proj: Tensor) -> Any:
    low = x @ proj
    target = torch.arange(12)
    losses = F.cross_entropy(low, target), F.mse_loss(low, x), F.cosine_similarity(low, x)
    products = torch.tensordot(x, proj, 1), torch.inner(x, proj), torch.linalg.matrix_power(proj, 3)
    more = torch.cdist(x, x), F.bilinear(x, x, W1), torch.linalg.multi_dot([x, proj, proj])
    return *losses, *products, *more, torch.kron(x[:2], proj[:2])


def layers(x: Tensor, proj: Tensor) -> Any:
    attended, _ = CELL(x[None], x[None], x[None], need_weights=False)
    fused = F.scaled_dot_product_attention(x[None, None], x[None, None], attended[None])
    image = F.conv2d(IMAGE, KERNEL, padding="same"), F.conv2d(IMAGE, KERNEL)
    return attended, fused, *image, F.linear(x, proj), F.prelu(x, proj[0, :1])


def custom_ops(x: Tensor, proj: Tensor) -> Any:
    return doubled(x), doubled(x @ proj) @ proj


def under_vmap(x: Tensor, proj: Tensor) -> Any:
    return torch.vmap(lambda row: proj @ row + row.sum())(x) * 2


def own_function(x: Tensor, proj: Tensor) -> Any:
    return Squared.apply(x @ proj) @ x


def checkpointed(x: Tensor, proj: Tensor) -> Any:
    return checkpoint(lambda t: torch.relu(t @ proj) @ proj, x, use_reentrant=False) + 1


def one_weight_twice(x: Tensor, proj: Tensor) -> Any:
    return (x @ proj) @ proj + x @ proj


def asks(x: Tensor, proj: Tensor) -> Any:
    return x @ proj if torch.is_autocast_enabled("cpu") else x


def set_by_hand(x: Tensor, proj: Tensor) -> Any:
    before = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", True)
    low = x @ proj
    torch.set_autocast_enabled("cpu", before)
    return low, x.double() @ proj.double()


SITUATIONS = (
    routed,
    off_inside,
    other_dtype_inside,
    einsums,
    mixed_dtypes,
    in_place,
    in_full_precision,
    composed,
    layers,
    custom_ops,
    under_vmap,
    own_function,
    checkpointed,
    one_weight_twice,
    asks,
)


def captured(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: aot_eager of what is captured."""
    graph = capture(module, list(inputs))
    switch_off(graph)
    return base_compiler("aot_eager")(graph, list(inputs))


def outcome(
    function: Callable[..., Any], backend: Any, around: Any, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients of both arguments)."""
    torch._dynamo.reset()
    x, proj = (t.clone().requires_grad_(training) for t in (X, PROJ))
    with around, torch.set_grad_enabled(training):
        results = torch.compile(function, backend=backend, fullgraph=True)(x, proj)
    results = list(results) if isinstance(results, tuple) else [results]
    if not training:
        return results, []
    weights = torch.Generator().manual_seed(1)
    loss = sum((r.double() * torch.randn(r.shape, generator=weights)).sum() for r in results)
    return results, list(torch.autograd.grad(loss, (x, proj), allow_unused=True))


def inside(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def region(x: Tensor, proj: Tensor) -> Any:
        with torch.autocast("cpu", BF16, **options):
            return function(x, proj)

    return region


def assert_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("where", ["inside", "around", "uncached", "cached", "nested"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_captured_equals_aot_eager(
    situation: Callable[..., Any], where: str, training: bool
) -> None:
    around: Any = torch.autocast("cpu", BF16) if where in ("around", "nested") else nullcontext()
    function = {
        "inside": inside(situation),
        "around": situation,
        "nested": inside(situation, enabled=False),
        "uncached": inside(situation, cache_enabled=False),
        "cached": inside(situation, cache_enabled=True),
    }[where]
    wanted = outcome(function, "aot_eager", around, training)
    found = outcome(function, captured, around, training)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


def test_state_set_by_hand() -> None:
    wanted, _ = outcome(set_by_hand, "aot_eager", nullcontext(), False)
    found, _ = outcome(set_by_hand, captured, nullcontext(), False)
    assert_same(found, wanted)
