"""What compiles without moe_fx compiles with it: to the same values, gradients and changed state.

Each program has an MoE layer, so that its graph is captured and worked on, and beside it something
that a capture may stumble over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _pytree as pytree

import moe_fx
from moe_fx.entry.net import VARIABLE
from moe_fx.region import Declined
from tests.e2e.quantised import Quantised

E, H, T, K = 4, 16, 6, 2
EXACT = 1e-5


class Experts(nn.Module):
    """A layer in its plainest spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(E, H))
        self.w1 = nn.Parameter(torch.randn(E, H, 24) / 4)
        self.w2 = nn.Parameter(torch.randn(E, 24, H) / 4)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = torch.softmax(x @ self.gate.t(), -1).topk(K)
        h = torch.relu(torch.einsum("th,tkhi->tki", x, self.w1[ids]))
        return (torch.einsum("tki,tkih->tkh", h, self.w2[ids]) * w[..., None]).sum(1)


class Model(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.moe = Experts()
        self.linear = nn.Linear(H, H)
        self.tied = nn.Linear(H, H, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("seen", torch.zeros(H))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any) -> Any:
        return self.program.forward(self, *args)


@dataclass(frozen=True)
class Program:
    """found: the layer beside it is still found. net: what moe_fx makes of it today is an error,
    which the net catches."""

    forward: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    found: bool = True
    net: bool = False
    fullgraph: bool = False
    dynamic: bool | None = None


PROGRAMS: dict[str, Program] = {}


def tokens() -> tuple[Any, ...]:
    return (torch.randn(T, H, requires_grad=True),)


def program(
    make: Callable[[], tuple[Any, ...]] = tokens, **kwargs: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        PROGRAMS[forward.__name__] = Program(forward, make, **kwargs)
        return forward

    return note


# -- function transforms and higher-order ops ------------------------------------------------------


@program()
def gradient_inside(m: Model, x: Tensor) -> Any:
    return m.moe(x) + torch.func.grad(lambda v: v.sin().sum())(x)


@program()
def vmap_inside(m: Model, x: Tensor) -> Any:
    return m.moe(x) + torch.vmap(lambda row: row * row.sum())(x)


@program()
def jvp_inside(m: Model, x: Tensor) -> Any:
    return m.moe(x) + torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]


@program()
def cond(m: Model, x: Tensor) -> Any:
    return m.moe(torch.cond(x.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (x,)))


@program(lambda: (torch.randn(T, H),))
def while_loop(m: Model, x: Tensor) -> Any:
    from torch._higher_order_ops.while_loop import while_loop as loop

    at, grown = loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 1.5), (torch.tensor(0), x))
    return m.moe(grown), at


@program()
def scan(m: Model, x: Tensor) -> Any:
    from torch._higher_order_ops.scan import scan as scanned

    last, all_sums = scanned(lambda c, v: (c + v, c * 1.0), torch.zeros(H), x, dim=0)
    return m.moe(all_sums) + last


@program(lambda: (torch.randn(1, 2, 16, H),))
def flexible_attention(m: Model, x: Tensor) -> Any:
    mixed = flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score + (q - k))
    return m.moe(mixed.flatten(0, 2))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grads[0] * 2 + 0 * x


@program()
def own_autograd_function(m: Model, x: Tensor) -> Any:
    return Doubled.apply(m.moe(Doubled.apply(x)))


@program()
def checkpoint_inside(m: Model, x: Tensor) -> Any:
    return m.moe(x) + torch.utils.checkpoint.checkpoint(
        lambda v: m.linear(v).sin(), x, use_reentrant=False
    )


# -- dtypes and layouts ----------------------------------------------------------------------------


@program()
def complex_numbers(m: Model, x: Tensor) -> Any:
    return m.moe(torch.fft.ifft(torch.fft.fft(x)).real), torch.view_as_complex(x.view(T, -1, 2))


@program(lambda: (torch.randn(T, H), torch.eye(T).to_sparse()))
def sparse_input(m: Model, x: Tensor, mixing: Tensor) -> Any:
    return m.moe(torch.sparse.mm(mixing, x))


@program(
    lambda: (
        torch.nested.nested_tensor([torch.randn(2, H), torch.randn(4, H)], layout=torch.jagged),
    ),
    found=False,
)
def jagged_input(m: Model, x: Tensor) -> Any:
    return m.moe(x.values()), x * 2


@program(lambda: (torch.randn(T, H), torch.randint(-128, 127, (H, H), dtype=torch.int8)))
def quantised_linear(m: Model, x: Tensor, weight: Tensor) -> Any:
    return m.moe(F.linear(x, weight.float() * 0.01))


@program(lambda: (torch.randn(T, H), (torch.randn(H, H) / 4).to(torch.float8_e4m3fn)))
def float8_linear(m: Model, x: Tensor, weight: Tensor) -> Any:
    return m.moe(F.linear(x, weight.float())), weight


@program(lambda: (torch.randn(T, H), Quantised.of(torch.randn(H, H))), found=False)
def subclass_input(m: Model, x: Tensor, weight: Tensor) -> Any:
    return m.moe(F.linear(x, weight))


@program(lambda: (torch.randn(T, H), Quantised.of(torch.randn(H, H))), found=False)
def subclass_input_and_output(m: Model, x: Tensor, weight: Tensor) -> Any:
    return m.moe(x), weight.t()


# -- state that changes ----------------------------------------------------------------------------


@program()
def buffer_changed(m: Model, x: Tensor) -> Any:
    m.seen.add_(x.detach().sum(0))
    m.count += 1
    return m.moe(x) + m.seen


@program()
def buffer_replaced(m: Model, x: Tensor) -> Any:
    m.seen = m.seen * 0.5 + x.detach().mean(0)
    return m.moe(x) + m.seen


@program(lambda: (torch.randn(T, H), torch.zeros(T, H)))
def input_changed(m: Model, x: Tensor, cache: Tensor) -> Any:
    cache.copy_(m.moe(x))
    return cache.sum()


@program(lambda: (torch.randn(T, H), torch.zeros(2 * T, H)))
def view_of_input_changed(m: Model, x: Tensor, cache: Tensor) -> Any:
    cache[T:].add_(m.moe(x))
    cache.view(-1)[:3] = 7
    return cache.mean()


@program(lambda: (torch.randn(T, H), torch.zeros(4, 4)))
def input_changed_and_returned(m: Model, x: Tensor, cache: Tensor) -> Any:
    cache.add_(1)
    return m.moe(x), cache


@program(lambda: (lambda base: (base[:T], base[2:]))(torch.randn(T + 2, H)), found=False)
def inputs_that_overlap(m: Model, x: Tensor, other: Tensor) -> Any:
    other.mul_(2)
    return m.moe(x), x.sum()


# -- what comes in and goes out --------------------------------------------------------------------


@program()
def outputs_that_alias(m: Model, x: Tensor) -> Any:
    out = m.moe(x)
    return out, out.view(-1), out[0], out.t()


@program()
def input_returned(m: Model, x: Tensor) -> Any:
    return x, m.moe(x), x.view(-1)


@program()
def parameter_returned(m: Model, x: Tensor) -> Any:
    return m.moe(x), m.linear.weight, m.moe.gate.t()


@program()
def same_input_twice(m: Model, x: Tensor) -> Any:
    return two_tokens(m, x, x)


def two_tokens(m: Model, x: Tensor, y: Tensor) -> Tensor:
    return m.moe(x) + m.linear(y)


@program(lambda: 2 * (torch.randn(T, H),))
def one_tensor_as_two_inputs(m: Model, x: Tensor, y: Tensor) -> Any:
    return two_tokens(m, x, y)


@program()
def tied_parameters(m: Model, x: Tensor) -> Any:
    return m.tied(m.linear(m.moe(x)))


@program(lambda: (torch.randn(T, H), None, {"scale": 2.0, "flag": True}))
def none_and_dict(m: Model, x: Tensor, mask: Tensor | None, more: dict[str, Any]) -> Any:
    out = m.moe(x) * more["scale"]
    return {"out": out if mask is None else out * mask, "mask": mask, "number": 3}


@program(lambda: (torch.randn(T, H), torch.empty(0, H)))
def empty_tensor(m: Model, x: Tensor, nothing: Tensor) -> Any:
    return m.moe(torch.cat([nothing, x])), nothing @ m.moe.gate.t()


@program(lambda: (torch.randn(0, H),), found=False, net=True)
def no_tokens(m: Model, x: Tensor) -> Any:
    return m.moe(x)


@program(lambda: (torch.randn(T, H), 5), dynamic=True)
def sizes_in_and_out(m: Model, x: Tensor, n: int) -> Any:
    return m.moe(x) * n, n + 1, x.shape[0] * 2


@program(lambda: (torch.randn(T, H), 0.5), dynamic=True)
def floats_in(m: Model, x: Tensor, factor: float) -> Any:
    return m.moe(x) * factor


@program(lambda: (torch.randn(T, H),))
def nothing_returned(m: Model, x: Tensor) -> Any:
    m.seen.copy_(m.moe(x).sum(0))


# -- sizes that depend on data ---------------------------------------------------------------------


@program(lambda: (torch.randn(T, H),), fullgraph=True)
def nonzero(m: Model, x: Tensor) -> Any:
    at = (x[:, 0] > 0).nonzero().squeeze(-1)
    return m.moe(x), at


@program(lambda: (torch.randn(T, H),), fullgraph=True)
def tokens_selected_by_data(m: Model, x: Tensor) -> Any:
    return m.moe(x[x[:, 0] > 0])


@program(lambda: (torch.randn(T, H), torch.tensor(3)), fullgraph=True)
def item(m: Model, x: Tensor, n: Tensor) -> Any:
    count = n.item()
    torch._check(count >= 0)
    return m.moe(x) * count, torch.ones(count)


@program(lambda: (torch.randn(T, H), torch.tensor(3)))
def graph_break(m: Model, x: Tensor, n: Tensor) -> Any:
    out = m.moe(x)
    torch._dynamo.graph_break()
    return out * n.item()


# -- randomness and gradient modes -----------------------------------------------------------------


@program()
def dropout(m: Model, x: Tensor) -> Any:
    return F.dropout(m.moe(x), 0.5) + torch.randn(H) + torch.rand_like(x)


@program()
def without_gradients_inside(m: Model, x: Tensor) -> Any:
    with torch.no_grad():
        frozen = m.linear(x)
    return m.moe(x) + frozen


@program()
def gradients_switched(m: Model, x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    frozen = m.linear(x)
    torch.set_grad_enabled(True)
    return m.moe(x) * frozen + frozen.detach()


@program()
def inference_mode_inside(m: Model, x: Tensor) -> Any:
    with torch.inference_mode():
        n = m.linear(x).sum().clone()
    return m.moe(x), n


@program()
def expert_without_gradients(m: Model, x: Tensor) -> Any:
    with torch.no_grad():
        routed = m.moe(x)
    return routed + m.linear(x)


@program()
def gradient_hook(m: Model, x: Tensor) -> Any:
    out = m.moe(x)
    out.register_hook(lambda g: g * 2)
    return out


# -- the tests -------------------------------------------------------------------------------------


@dataclass
class Run:
    values: list[Any]
    gradients: list[Tensor | None]
    state: list[Tensor]


def run(name: str, wrap: Callable[[nn.Module], Callable[..., Any]]) -> Run:
    """A model and inputs that are the same for each call with ``name``, through ``wrap``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(PROGRAMS[name])
    inputs = PROGRAMS[name].make()
    torch.manual_seed(1)
    result = wrap(model)(*inputs)
    values = pytree.tree_leaves(result)
    roots = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    if roots:
        torch.stack([plain(root).abs().square().sum() for root in roots]).sum().backward()
    leaves = [*model.parameters(), *(v for v in inputs if isinstance(v, Tensor))]
    return Run(
        [plain(v) for v in values] + [torch.rand(())],  # the random stream is where it was
        [leaf.grad for leaf in leaves],
        [plain(v) for v in (*model.buffers(), *pytree.tree_leaves(inputs)) if torch.is_tensor(v)],
    )


def plain(value: Any) -> Any:
    if isinstance(value, Quantised):
        return value.dequantised()
    if isinstance(value, Tensor) and value.is_nested:
        return value.values()
    if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
        return value.float()
    return value.to_dense() if isinstance(value, Tensor) and value.is_sparse else value


def compare(name: str, base: str) -> tuple[list[moe_fx.Region], list[Declined]]:
    chosen = PROGRAMS[name]
    how: dict[str, Any] = {"fullgraph": chosen.fullgraph, "dynamic": chosen.dynamic}
    reports: list[moe_fx.Report] = []
    options = {"base": base, "on_report": reports.append}
    without = run(name, lambda model: torch.compile(model, backend=base, **how))
    found = run(name, lambda model: torch.compile(model, backend="moe_fx", options=options, **how))
    assert_same(without, found)
    regions = [region for report in reports for region in report.regions]
    declined = [each for report in reports for each in report.declined]
    return regions, declined


def assert_same(expected: Run, found: Run) -> None:
    for field in ("values", "gradients", "state"):
        left, right = getattr(expected, field), getattr(found, field)
        assert len(left) == len(right)
        for at, (one, other) in enumerate(zip(left, right, strict=True)):
            where = f"{field}[{at}]"
            assert type(one) is type(other), where
            if isinstance(one, Tensor):
                assert (one.dtype, one.shape) == (other.dtype, other.shape), where
                assert one.requires_grad == other.requires_grad, where
                torch.testing.assert_close(
                    other.detach(), one.detach(), rtol=EXACT, atol=EXACT, equal_nan=True, msg=where
                )
            else:
                assert one == other, where


@pytest.mark.parametrize("name", PROGRAMS)
def test_with_moe_fx_a_program_computes_what_it_computes_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if PROGRAMS[name].net:
        monkeypatch.setenv(VARIABLE, "1")
    regions, declined = compare(name, "aot_eager")
    assert bool(regions) == PROGRAMS[name].found, [d.reason for d in declined]
    if not regions:
        assert declined
    assert all(region.verified for region in regions)


# -- other widths, and exported graphs -------------------------------------------------------------


def gathered(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    w, ids = torch.softmax(x @ gate.t(), -1).topk(K)
    up, by = torch.einsum("th,tkhi->tki", x, w1[ids]).chunk(2, -1)
    return (torch.einsum("tki,tkih->tkh", F.silu(up) * by, w2[ids]) * w[..., None]).sum(1)


def loop(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    w, ids = torch.softmax(x @ gate.t(), -1).topk(K)
    out = torch.zeros_like(x)
    for e in range(E):
        up, by = (x @ w1[e]).chunk(2, -1)
        out = out + (w * (ids == e)).sum(-1, keepdim=True) * ((F.silu(up) * by) @ w2[e])
    return out


def masked(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    w, ids = torch.softmax(x @ gate.t(), -1).topk(K)
    full = torch.zeros(x.shape[0], E).scatter(1, ids, w)
    up, by = torch.einsum("th,ehi->tei", x, w1).chunk(2, -1)
    return torch.einsum("tei,eih,te->th", F.silu(up) * by, w2, full)


@pytest.mark.parametrize("dynamic", [None, False, True])
@pytest.mark.parametrize("layer", [gathered, loop, masked])
def test_a_function_of_experts_is_called_with_a_second_width(
    layer: Callable[..., Tensor], dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    options = {"base": "eager", "on_report": reports.append}
    compiled = torch.compile(layer, backend="moe_fx", dynamic=dynamic, options=options)
    x, gate = torch.randn(T, H), torch.randn(E, H)
    for width in (24, 16, 40):
        w1, w2 = torch.randn(E, H, 2 * width) / 4, torch.randn(E, width, H) / 4
        expected = layer(x, gate, w1, w2)
        torch.testing.assert_close(compiled(x, gate, w1, w2), expected, rtol=EXACT, atol=EXACT)
    for report in reports:
        assert report.regions or report.declined
        if layer is not masked:
            assert all("not a constant" in d.reason for d in report.declined)
    if dynamic is False:
        assert [len(report.regions) for report in reports] == [1, 1, 1]


@pytest.mark.parametrize("tokens_vary", [False, True])
def test_an_exported_program_is_compiled(tokens_vary: bool) -> None:
    torch._dynamo.reset()
    model, x = Experts(), torch.randn(T, H)
    sizes = {"x": {0: torch.export.Dim("tokens", min=2, max=64)}} if tokens_vary else None
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    reports: list[moe_fx.Report] = []
    options = {"base": "aot_eager", "on_report": reports.append}
    compiled = torch.compile(exported, backend="moe_fx", options=options)
    for count in (T, 9) if tokens_vary else (T,):
        x = torch.randn(count, H)
        torch.testing.assert_close(compiled(x), model(x), rtol=EXACT, atol=EXACT)
    assert reports and all(len(report.regions) == 1 for report in reports)
