"""Layers whose tables of experts are computed in the forward, and what runs on a rank with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule

import moe_fx
from moe_fx.weights.shard import shard_experts

EXPERTS, HIDDEN, WIDTH, TOP_K, RANK, GROUP = 4, 16, 16, 2, 4, 8


def _drawn(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _codes(*sizes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, sizes, dtype=torch.int8, generator=generator)


class Table(nn.Module):
    """One table ``[E, H, F]``, computed in ``forward`` from the module's parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def add(self, name: str, values: Tensor) -> None:
        setattr(self, name, nn.Parameter(values, requires_grad=values.is_floating_point()))

    def of(self, expert: int) -> Tensor:
        """One expert's matrix, computed from that expert's entries."""
        raise NotImplementedError


class Int8(Table):
    """A code per entry, a scale per column."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("codes", _codes(EXPERTS, HIDDEN, WIDTH, seed=seed))
        self.add("scale", torch.rand(EXPERTS, 1, WIDTH) * 0.002 + 0.002)

    def forward(self) -> Tensor:
        return self.codes.float() * self.scale

    def of(self, expert: int) -> Tensor:
        return self.codes[expert].float() * self.scale[expert]


class Int4(Table):
    """Two codes a byte, a scale and a zero for each group of rows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        packed = _codes(EXPERTS, HIDDEN // 2, WIDTH, seed=seed).view(torch.uint8)
        self.add("packed", packed)
        self.add("scale", torch.rand(EXPERTS, HIDDEN // GROUP, 1, WIDTH) * 0.04 + 0.04)
        self.add("zero", torch.rand(EXPERTS, HIDDEN // GROUP, 1, WIDTH) + 7)

    def forward(self) -> Tensor:
        codes = torch.stack([self.packed & 0xF, self.packed >> 4], 2).view(EXPERTS, HIDDEN, WIDTH)
        grouped = codes.view(EXPERTS, HIDDEN // GROUP, GROUP, WIDTH).float()
        return ((grouped - self.zero) * self.scale).reshape(EXPERTS, HIDDEN, WIDTH)

    def of(self, expert: int) -> Tensor:
        packed = self.packed[expert]
        codes = torch.stack([packed & 0xF, packed >> 4], 1).view(HIDDEN // GROUP, GROUP, WIDTH)
        return ((codes.float() - self.zero[expert]) * self.scale[expert]).reshape(HIDDEN, WIDTH)


class Int4InPlace(Int4):
    """The same, unpacked into a buffer."""

    def forward(self) -> Tensor:
        codes = torch.empty(EXPERTS, HIDDEN, WIDTH)
        codes[:, ::2] = self.packed & 0xF
        codes[:, 1::2] = self.packed >> 4
        grouped = codes.view(EXPERTS, HIDDEN // GROUP, GROUP, WIDTH)
        return ((grouped - self.zero) * self.scale).view(EXPERTS, HIDDEN, WIDTH)


class Fp8(Table):
    """Bytes that are read as floats of 8 bits, a scale per block of 8 by 8."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        values = _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed).to(torch.float8_e4m3fn)
        self.add("bytes", values.view(torch.uint8))
        self.add("scale", torch.rand(EXPERTS, HIDDEN // 8, WIDTH // 8) * 0.2 + 0.2)

    def forward(self) -> Tensor:
        scale = self.scale.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return self.bytes.view(torch.float8_e4m3fn).float() * scale

    def of(self, expert: int) -> Tensor:
        scale = self.scale[expert].repeat_interleave(8, 0).repeat_interleave(8, 1)
        return self.bytes[expert].view(torch.float8_e4m3fn).float() * scale


class Lora(Table):
    """A weight, and a product of small matrices of each expert's own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("weight", _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed) / 4)
        self.add("a", _drawn(EXPERTS, HIDDEN, RANK, seed=seed + 1) / 4)
        self.add("b", _drawn(EXPERTS, RANK, WIDTH, seed=seed + 2) / 2)

    def forward(self) -> Tensor:
        return self.weight + 0.5 * torch.bmm(self.a, self.b)

    def of(self, expert: int) -> Tensor:
        return self.weight[expert] + 0.5 * (self.a[expert] @ self.b[expert])


class LoraShared(Lora):
    """The same, with one matrix that all experts share."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.a = nn.Parameter(_drawn(HIDDEN, RANK, seed=seed + 1) / 4)

    def forward(self) -> Tensor:
        return self.weight + torch.einsum("hr,erf->ehf", self.a, self.b)

    def of(self, expert: int) -> Tensor:
        return self.weight[expert] + self.a @ self.b[expert]


class Pruned(Table):
    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("weight", _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed) / 4)
        self.add("keep", _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed + 1) > 0)

    def forward(self) -> Tensor:
        return self.weight * self.keep

    def of(self, expert: int) -> Tensor:
        return self.weight[expert] * self.keep[expert]


class Normed(Table):
    """Columns of unit length, times a learned length."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("weight", _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed))
        self.add("length", torch.rand(EXPERTS, 1, WIDTH) + 0.5)

    def forward(self) -> Tensor:
        return nn.functional.normalize(self.weight, dim=1) * self.length

    def of(self, expert: int) -> Tensor:
        return nn.functional.normalize(self.weight[expert], dim=0) * self.length[expert]


class Joined(Table):
    """Two halves side by side, with their columns reordered."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("left", _drawn(EXPERTS, HIDDEN, WIDTH // 2, seed=seed) / 4)
        self.add("right", _drawn(EXPERTS, HIDDEN, WIDTH // 2, seed=seed + 1) / 4)
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("order", order)

    def forward(self) -> Tensor:
        return torch.cat([self.left, self.right], 2)[:, :, self.order]

    def of(self, expert: int) -> Tensor:
        return torch.cat([self.left[expert], self.right[expert]], 1)[:, self.order]


class Centred(Table):
    """Each expert's difference to the mean of all: no rank can make its own of its shard."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.add("weight", _drawn(EXPERTS, HIDDEN, WIDTH, seed=seed) / 4)

    def forward(self) -> Tensor:
        return self.weight - self.weight.mean(0)

    def of(self, expert: int) -> Tensor:
        return self.weight[expert] - self.weight.mean(0)


TABLES: dict[str, type[Table]] = {
    "int8": Int8,
    "int4": Int4,
    "int4_in_place": Int4InPlace,
    "fp8": Fp8,
    "lora": Lora,
    "lora_shared": LoraShared,
    "pruned": Pruned,
    "normed": Normed,
    "joined": Joined,
    "centred": Centred,
}


def gathered(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    h = torch.relu(torch.einsum("th,tkhf->tkf", x, w1()[ids]))
    return (torch.einsum("tkf,tkfh->tkh", h, w2()[ids]) * weights[..., None]).sum(1)


def batched(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(TOP_K, 0).unsqueeze(1)
    h = torch.relu(torch.bmm(rows, w1()[flat]))
    rows = torch.bmm(h, w2()[flat]).squeeze(1) * weights.reshape(-1, 1)
    return rows.view(x.shape[0], TOP_K, -1).sum(1)


def grouped(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=EXPERTS)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    rows = x[order // TOP_K]
    multiply = torch.ops.moe_fx.grouped_mm
    rows = multiply(torch.relu(multiply(rows, w1(), offsets)), w2(), offsets)
    rows = (rows * weights.reshape(-1)[order].unsqueeze(1))[torch.argsort(order)]
    return rows.view(x.shape[0], TOP_K, -1).sum(1)


def dense(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    combine = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    h = torch.relu(torch.einsum("th,ehf->etf", x, w1()))
    return torch.einsum("etf,efh,te->th", h, w2(), combine)


def dense_bmm(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    combine = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    h = torch.relu(torch.bmm(x.expand(EXPERTS, -1, -1), w1()))
    return (torch.bmm(h, w2()) * combine.t().unsqueeze(-1)).sum(0)


def loop(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    first, second = w1(), w2()
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        share = (weights * (ids == expert)).sum(-1, keepdim=True)
        out = out + share * (torch.relu(x @ first[expert]) @ second[expert])
    return out


def loop_inside(x: Tensor, weights: Tensor, ids: Tensor, w1: Table, w2: Table) -> Tensor:
    """Each expert's matrix is computed where it is used."""
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        share = (weights * (ids == expert)).sum(-1, keepdim=True)
        out = out + share * (torch.relu(x @ w1.of(expert)) @ w2.of(expert))
    return out


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each
    for each in (gathered, batched, grouped, dense_bmm, dense, loop, loop_inside)
}


class Layer(nn.Module):
    """times: how often tokens pass through the layer, with the same parameters."""

    def __init__(self, table: str, spelling: str, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        with torch.no_grad():
            self.gate.weight.copy_(_drawn(EXPERTS, HIDDEN, seed=3))
        self.experts = nn.ModuleList([TABLES[table](10), TABLES[table](20)])
        self.spelling, self.times = spelling, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            weights, ids = torch.softmax(self.gate(x), -1).topk(TOP_K)
            x = x + SPELLINGS[self.spelling](x, weights, ids, *self.experts)
        return x


class OwnTable(nn.Module):
    """One expert's matrix with its adapter, as a module."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_drawn(HIDDEN, WIDTH, seed=seed) / 4)
        self.a = nn.Parameter(_drawn(HIDDEN, RANK, seed=seed + 1) / 4)
        self.b = nn.Parameter(_drawn(RANK, WIDTH, seed=seed + 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.a @ self.b)


class ModuleListLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        pairs = [(OwnTable(10 * e), nn.ReLU(), OwnTable(10 * e + 5)) for e in range(EXPERTS)]
        self.experts = nn.ModuleList([nn.Sequential(*pair) for pair in pairs])

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.softmax(self.gate(x), -1).topk(TOP_K)
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            out = out + (weights * (ids == at)).sum(-1, keepdim=True) * expert(x)
        return out


# -- on a rank -------------------------------------------------------------------------------------

_GRAPHS: list[GraphModule] = []


@register_backend(name="keeping")
def keeping(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    _GRAPHS.append(module)
    return module.forward


@dataclass(frozen=True)
class Seen:
    """On a rank. error, gradient_error: relative to eager's, the largest; gathers: left in the
    graph that the base compiler got."""

    regions: int
    reasons: tuple[str, ...]
    error: float
    gradient_error: float
    gathers: int
    strict_raised: bool
    verified: bool


def shown(
    rank: int,
    model: nn.Module,
    program: str,
    *,
    sharded: tuple[str, ...] = ("experts.*",),
    training: bool = True,
    base: str = "keeping",
    tokens: int = 9,
    **given: Any,
) -> Seen:
    """``model`` in eager against compiled, with other tokens on each rank. program: "gathered" (the
    parameters ``sharded``) or "replicated"."""
    group = dist.group.WORLD
    assert group is not None
    x = _drawn(tokens + rank, HIDDEN, seed=100 + rank)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.set_grad_enabled(training):
        expected = model(x)
    wanted = _gradients(model, expected, names) if training else {}
    reports: list[moe_fx.Report] = []
    options = {"base": base, "on_report": reports.append, **given}
    if program == "gathered":
        shard_experts(model, group, params=_of_experts(model, sharded))
    else:
        options["ep_group"] = group
    _GRAPHS.clear()
    torch._dynamo.reset()
    strict_raised = False
    with torch.set_grad_enabled(training):
        compiled = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)
        try:
            found = compiled(x)
        except BackendCompilerFailed as error:
            assert "NothingMatched" in str(error)
            strict_raised, found = True, expected
    worst = 0.0
    if training and not strict_raised:
        for name, gradient in _gradients(model, found, names).items():
            whole = wanted[name]
            if gradient.shape != whole.shape:
                whole = whole.chunk(group.size())[rank]
            worst = max(worst, _relative(gradient, whole))
    (report,) = reports
    return Seen(
        len(report.regions),
        tuple(each.reason for each in report.declined),
        _relative(found, expected),
        worst,
        sum("all_gather" in str(n.target) for g in _GRAPHS for n in g.graph.nodes),
        strict_raised,
        all(region.verified for region in report.regions),
    )


def _of_experts(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names of the parameters with an entry for each expert."""
    return [
        name
        for name, parameter in model.named_parameters()
        if any(fnmatchcase(name, pattern) for pattern in patterns) and parameter.shape[0] == EXPERTS
    ]


def layer(
    rank: int, table: str, spelling: str, program: str, given: dict[str, Any] | None = None
) -> Seen:
    """given: options, or arguments of `shown`."""
    return shown(rank, Layer(table, spelling), program, **(given or {}))


def twice(rank: int, table: str, spelling: str, program: str) -> Seen:
    return shown(rank, Layer(table, spelling, times=2), program)


def listed(rank: int) -> Seen:
    return shown(rank, ModuleListLayer(), "replicated")


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max().clamp_min(1e-30))


def _gradients(model: nn.Module, out: Tensor, names: list[str]) -> dict[str, Tensor]:
    """By name before sharding: of this rank's shard, or summed over ranks."""
    model.zero_grad(set_to_none=True)
    torch.sin(out.double() * 3).sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if name in names:
            gradient: Any = parameter.grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
            if isinstance(gradient, DTensor):
                gradient = gradient.to_local()
            else:
                dist.all_reduce(gradient)
            found[name] = gradient.detach()
    return found
