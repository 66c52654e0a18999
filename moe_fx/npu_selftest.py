"""``python -m moe_fx.npu_selftest``: does moe_fx work on these NPUs? A report to attach to a bug.

Needs one or more NPUs with CANN and torch_npu, and transformers. In minutes: each torch_npu op that
lowerings emit against its reference on CPU; then, on one rank per device, a model with experts
under npugraph_ex, torchair and eager, with each strategy: its results against the model as it is,
whether a replayed graph gives the same, and what cutting the exchange into chunks gains.

``--device cpu`` runs what it can on CPU, through the references, over Gloo: a test of this script
(torch_npu must be importable all the same).
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import moe_fx
from moe_fx.cli.tiny import tiny_model
from moe_fx.devices.ascend import npu, reference
from moe_fx.errors import ConfigurationError
from moe_fx.testing import RankPool

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_ROUNDS = {"npu": 20, "cpu": 2}
_TIMEOUT = 600.0
_MODEL = {"hidden_size": 1024, "moe_intermediate_size": 512}
_TOKENS = 128
_STRATEGIES: tuple[tuple[str, int], ...] = (
    ("alltoall", 1),
    ("alltoall", 4),
    ("allgather", 1),
    ("allgather", 4),
    ("mc2", 1),
)


@dataclass(frozen=True)
class Check:
    """passed: None: could not be tried, ``detail`` says why."""

    name: str
    passed: bool | None
    detail: str


def op_checks(device: str) -> Iterator[Check]:
    """Each op that lowerings emit, on the device against the reference."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, args, kwargs in _calls(dtype):
            label = f"npu::{name} {str(dtype).removeprefix('torch.')}"
            yield _tried(label, partial(_op, name, args, kwargs, device, dtype))


def _op(name: str, args: Any, kwargs: Any, device: str, dtype: torch.dtype) -> Check:
    wanted = getattr(reference, name.removeprefix("npu_").removeprefix("moe_"))(*args, **kwargs)
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
    found = getattr(torch.ops.npu, name)(*moved[0], **moved[1])
    said = _tensors(wanted)[:3]  # the scales of npu_moe_init_routing_v2 are undefined here
    pairs = zip(_tensors(found), said, strict=False)
    error = max(_relative(one.cpu(), other) for one, other in pairs if other.numel())
    return Check("", error <= _TOLERANCE[dtype], f"relative difference {error:.1e}")


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().abs().max().clamp(min=1e-9)
    return float((found.double() - expected.double()).abs().max() / scale)


def _calls(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    tokens, top_k, experts, hidden = 64, 4, 16, 256
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    logits = torch.randn(tokens, experts, generator=generator)
    ids = logits.topk(top_k).indices.to(torch.int32)
    probs = logits.softmax(-1).topk(top_k).values.to(dtype)
    x, rows = random(tokens, hidden), random(tokens * top_k, hidden)
    row_map = reference.token_permute(x, ids)[1]
    ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0)
    groups = {"group_list": ends, "split_item": 3, "group_type": 0, "group_list_type": 0}
    routing = {
        "active_num": -1,
        "expert_num": experts,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, experts],
        "row_idx_type": 0,
    }
    return [
        ("npu_moe_token_permute", (x, ids), {}),
        ("npu_moe_token_unpermute", (rows, row_map, probs), {}),
        ("npu_moe_token_permute_grad_v2", (rows, row_map, tokens, dtype, top_k), {}),
        ("npu_grouped_matmul", ([rows], [random(experts, hidden, 128)]), groups),
        ("npu_swiglu", (rows,), {}),
        ("npu_moe_gating_top_k_softmax", (random(tokens, experts), None, top_k), {}),
        ("npu_moe_init_routing_v2", (x, ids), routing),
        (
            "npu_moe_finalize_routing",
            (rows, None, None, None, probs, row_map, None, 2, top_k),
            {},
        ),
    ]


@dataclass(frozen=True)
class Ran:
    """error: against the model as it is; replayed: of a second call against the first."""

    error: float
    replayed: float
    milliseconds: float
    declined: tuple[str, ...]
    kept: tuple[str, ...]


def model_on_rank(rank: int, device: str, base: str, strategy: str, chunks: int) -> Ran:
    torch.set_grad_enabled(False)
    npu.torchair()
    if device == "npu":
        npu.device().set_device(rank)
        group: Any = dist.new_group(backend="hccl")
    else:
        npu.npugraph_ex()
        reference.register()
        group = dist.group.WORLD
    model: Any = tiny_model("qwen3_moe", **_MODEL, attn_implementation="eager").bfloat16()
    model = model.to(device)
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=generator).to(device)
    reports: list[moe_fx.Report] = []
    options = {
        "base": base,
        "lower": "npu",
        "ep_group": group,
        "strategy": strategy,
        "overlap": chunks,
        "on_report": reports.append,
    }
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="moe_fx", fullgraph=True, options=options)

    def call(function: Callable[..., Any]) -> Tensor:
        logits: Tensor = function(input_ids=ids, use_cache=False).logits
        return logits.clone()

    expected, first, second = call(model), call(compiled), call(compiled)
    seconds = [_timed(lambda: call(compiled), device) for _ in range(_ROUNDS[device])]
    return Ran(
        # Of the whole: where the router nearly ties, some token may meet another expert.
        float((first - expected).float().norm() / expected.float().norm()),
        _relative(second.cpu(), first.cpu()),
        1e3 * statistics.median(seconds),
        tuple(declined.reason for report in reports for declined in report.declined),
        tuple({f"{low.op}: {low.kept}" for r in reports for low in r.lowered if low.kept}),
    )


def _timed(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "npu":
        npu.device().synchronize()
    return time.perf_counter() - start


def model_checks(device: str, ranks: int, bases: Sequence[str]) -> Iterator[Check]:
    for base in bases:
        with RankPool(ranks) as pool:  # torchair can't be loaded beside npugraph_ex
            for strategy, chunks in _STRATEGIES:
                label = f"{base}: {strategy}" + f" in {chunks} chunks" * (chunks > 1)
                yield _tried(label, partial(_model, pool, device, base, strategy, chunks))


def _model(pool: RankPool, device: str, base: str, strategy: str, chunks: int) -> Check:
    results = pool.run(model_on_rank, device, base, strategy, chunks, timeout=_TIMEOUT)
    slowest = max(result.milliseconds for result in results)
    declined = {reason for result in results for reason in result.declined}
    if declined:
        return Check("", None, f"declined: {'; '.join(sorted(declined))}")
    error = max(result.error for result in results)
    again = max(result.replayed for result in results)
    passed = error <= 5e-2 and again <= 1e-2
    kept = sorted({each for result in results for each in result.kept})
    detail = f"difference {error:.1e}, second call {again:.1e}, {slowest:.2f} ms"
    return Check("", passed, detail + "".join(f"\nkept as it is: {each}" for each in kept))


def _tried(name: str, check: Callable[[], Check]) -> Check:
    try:
        found = check()
    except Exception as error:  # whatever goes wrong on a device is what the report is for
        return Check(name, False, f"{type(error).__name__}: {str(error)[-1500:]}")
    return Check(name, found.passed, found.detail)


def environment(device: str) -> dict[str, str]:
    import torch_npu
    import transformers

    found = {
        "moe_fx": moe_fx.__version__,
        "torch": torch.__version__,
        "torch_npu": torch_npu.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    if device == "npu":
        found["name"] = npu.device().get_device_name()
        found["count"] = str(npu.device().device_count())
    return found


def main(
    device: Annotated[str, typer.Option(help="npu, or cpu to try this script out")] = "npu",
    ranks: Annotated[int, typer.Option(help="0: one per device")] = 0,
    bases: Annotated[str, typer.Option(help="compilers, by commas")] = (
        "aot_eager,npugraph_ex,torchair"
    ),
    report: Annotated[Path, typer.Option(help="where the JSON goes")] = Path("npu_selftest.json"),
) -> None:
    """Check moe_fx on the NPUs of this machine and write a report."""
    console = Console()
    try:
        npu.torchair()
    except ConfigurationError as missing:
        console.print(str(missing), markup=False)
        raise typer.Exit(2) from None
    reference.register()
    count = ranks or (npu.device().device_count() if device == "npu" else 2)
    names = [name for name in bases.split(",") if name]
    checks: list[Check] = []
    with Progress(console=console) as progress:
        task = progress.add_task("checking", total=None)
        for each in (*op_checks(device), *model_checks(device, count, names)):
            checks.append(each)
            progress.update(task, advance=1, description=escape(each.name))
    found = environment(device) | {"ranks": str(count)}
    written = {"environment": found, "checks": [asdict(each) for each in checks]}
    report.write_text(json.dumps(written, indent=2), encoding="utf-8")
    console.print(_table(checks))
    said = f"{found}\nwritten to {report}: please attach it to a bug report."
    console.print(said, markup=False)
    raise typer.Exit(1 if any(each.passed is False for each in checks) else 0)


def _table(checks: Sequence[Check]) -> Table:
    table = Table("check", "", "detail")
    words = {True: "passed", False: "FAILED", None: "not tried"}
    for each in checks:
        table.add_row(escape(each.name), words[each.passed], escape(each.detail))
    return table


if __name__ == "__main__":
    typer.run(main)
