"""What is captured under autocast computes what ``aot_eager`` computes of it, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import moe_fx
from moe_fx.capture.autocast import switch_off
from moe_fx.capture.capture import capture
from moe_fx.compat import base_compiler, enter_autocast
from tests.e2e.ranks import expert_block

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
    one_hot = torch.einsum("te,th->eht", F.one_hot(torch.arange(len(x)) % 4, 4).float(), x)
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


def sizes_from_data(x: Tensor, proj: Tensor) -> Any:
    low = x @ proj
    many = low.sum().abs().long().item()
    torch._check(many >= 0)
    ids = (low.detach() > 0).nonzero()
    return low * many, F.cosine_similarity(x[ids[:, 0]], low[ids[:, 0]]), x[ids[:, 0]] @ proj


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
    sizes_from_data,
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


def check(function: Callable[..., Any], around: Any, training: bool) -> None:
    wanted = outcome(function, "aot_eager", around, training)
    found = outcome(function, captured, around, training)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


def assert_same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("where", ["inside", "around", "nested"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_captured_equals_aot_eager(
    situation: Callable[..., Any], where: str, training: bool
) -> None:
    """nested: autocast is on around, and off inside."""
    around: Any = nullcontext() if where == "inside" else torch.autocast("cpu", BF16)
    function = {
        "inside": inside(situation),
        "around": situation,
        "nested": inside(situation, enabled=False),
    }[where]
    check(function, around, training)


@pytest.mark.parametrize("cache_enabled", [False, True])
def test_each_use_of_a_weight_is_cast_as_the_cache_says(cache_enabled: bool) -> None:
    """With the cache, gradients of two uses are summed in bfloat16."""
    check(inside(one_weight_twice, cache_enabled=cache_enabled), nullcontext(), True)


def test_state_set_by_hand() -> None:
    check(set_by_hand, nullcontext(), True)


def cuda_policies(x: Tensor, proj: Tensor) -> Any:
    low = torch.einsum("th,hi->ti", x, proj)
    reduced = low.sum(), low.sum(0), low.cumsum(0), low.norm(), low.prod(0)
    scores = torch.softmax(low, -1), torch.softmax(low, -1, dtype=torch.float16)
    full = low.pow(2).mean(-1, keepdim=True).rsqrt() * low, low.exp(), F.layer_norm(low, (32,))
    wide = torch.addcmul(x, low, low), torch.cat([low, x]), F.mse_loss(low, x)
    return *reduced, *scores, *full, *wide, F.linear(low, proj), low.float() + 300.0


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_cuda_autocast_as_traced(dtype: torch.dtype) -> None:
    """Without a GPU, no run: below autocast, the captured graph comes down to the very ops, casts
    included, that the function comes down to under it."""
    with FakeTensorMode():
        x, proj = torch.empty(12, 32, device="cuda"), torch.empty(32, 32, device="cuda")
    with on_cuda(dtype):
        graph = capture(torch.fx.symbolic_trace(cuda_policies), [x, proj])
        wanted = make_fx(cuda_policies)(x, proj)
    found = make_fx(lambda *args: graph(*args))(x, proj)
    assert ops_of(found) == ops_of(wanted)
    assert any("aten.mm" in line and str(dtype) in line for line in ops_of(found))


@contextmanager
def on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast`` itself refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def ops_of(module: GraphModule) -> list[str]:
    """Each op with the dtype of what it gives, sorted: casts of two arguments have no order."""
    return sorted(
        f"{node.target} {getattr(node.meta.get('val'), 'dtype', None)}"
        for node in module.graph.nodes
        if node.op == "call_function" and "_assert" not in str(node.target)
    )


class LinearExperts(nn.Module):
    """A list of Linear experts, each on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        for parameter in self.parameters():
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            share = (weights * (ids == at)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


def experts_of(impl: str) -> nn.Module:
    return LinearExperts() if impl == "linears" else expert_block(impl=impl)


@pytest.mark.parametrize("base", ["eager", "aot_eager"])
@pytest.mark.parametrize("enters", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("impl", ["grouped_mm", "batched_mm", "linears"])
def test_experts_are_found_and_results_equal(impl: str, enters: bool, base: str) -> None:
    block = experts_of(impl).requires_grad_(False)
    x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    x = x[0, :, :32] if impl == "linears" else x
    around: Any = nullcontext() if enters else torch.autocast("cpu", BF16)

    def step(x: Tensor) -> Tensor:
        if enters:
            with torch.autocast("cpu", BF16):
                return block(x)
        return block(x)

    reports: list[moe_fx.Report] = []
    with around, torch.no_grad():
        torch._dynamo.reset()
        wanted = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        options = {"base": base, "verify": "always", "on_report": reports.append}
        found = torch.compile(step, backend="moe_fx", fullgraph=True, options=options)(x)
    (report,) = reports
    assert [region.verified for region in report.regions] == [True]
    assert report.declined == []
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= (1e-2 if impl == "linears" else 0) * wanted.abs().max()


def test_explain_sees_what_autocast_casts() -> None:
    block = experts_of("batched_mm")
    with torch.autocast("cpu", BF16), torch.no_grad():
        report = moe_fx.explain(block, torch.randn(1, 12, 64), ranks=2)
    assert [region.verified for region in report.regions] == [True]
    assert report.declined == []


def test_nothing_rewritten_nothing_changed() -> None:
    """The base compiler gets Dynamo's graph, its regions included, in the state it came in."""
    seen: list[GraphModule] = []

    def keep(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(module)
        assert torch.is_autocast_enabled("cpu")
        return module.forward

    register_backend(keep, name="keep_autocast")

    def selects(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return (x @ PROJ).topk(2).values

    torch._dynamo.reset()
    with torch.autocast("cpu", BF16):
        torch.compile(selects, backend="moe_fx", options={"base": "keep_autocast"})(X)
    assert any(node.target is enter_autocast for node in seen[0].graph.nodes)


def test_ops_compute_in_the_dtypes_of_their_arguments() -> None:
    """Whatever the caller's autocast: ``cat`` would not take float16 here."""
    pieces = [X[:5].half(), X[5:].half()]
    row_map = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
    wanted = torch.ops.moe_fx.unpermute_chunks(pieces, row_map, None, [12, 32])
    with torch.autocast("cpu", BF16):
        found = torch.ops.moe_fx.unpermute_chunks(pieces, row_map, None, [12, 32])
    assert_same([found], [wanted])


@pytest.mark.parametrize("situation", [routed, einsums], ids=["routed", "einsums"])
def test_dynamic_sizes(situation: Callable[..., Any]) -> None:
    """One graph for two numbers of tokens."""
    results = []
    for backend in ("aot_eager", captured):
        torch._dynamo.reset()
        function = inside(situation)
        compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
        results.append([r for x in (X, torch.cat([X, X])) for r in compiled(x, PROJ)])
    assert_same(*reversed(results))
