"""The command line: ``moe-fx demo``, ``moe-fx explain``, ``moe-fx bench``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from moe_fx.demo import DEFAULT_MODELS, run_demo
from moe_fx.errors import MoeFxError
from moe_fx.explain import explain
from moe_fx.target import load

DType = Literal["float32", "float64", "bfloat16", "float16"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a Mixture-of-Experts model into an expert-parallel program, by compiler pass.",
)


@app.command("demo")
def demo_command(
    ranks: Annotated[int, typer.Option(min=1, help="Processes to run, one rank each.")] = 2,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="transformers model type; may be repeated. Default: qwen3_moe, deepseek_v3."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate on each rank.")] = 32,
    base: Annotated[
        str, typer.Option(help="Base compiler: inductor, aot_eager or eager (fastest to start).")
    ] = "inductor",
) -> None:
    """Show it working: small real models, expert-parallel on this machine, against the original.

    Starts its own ranks (Gloo), loads each model with transformers' loader so that a rank holds
    only its experts, compiles with backend="moe_fx", generates from another prompt on each rank and
    compares every token with the unmodified model. Exit status 1 if anything differs.
    """
    console = Console()
    try:
        passed = run_demo(tuple(model or DEFAULT_MODELS), ranks, tokens, base, console)
    except MoeFxError as error:
        _fail(error)
    raise typer.Exit(0 if passed else 1)


@app.command("explain")
def explain_command(
    target: Annotated[
        str,
        typer.Argument(
            help="hf:MODEL_TYPE (a small model of that transformers family, as in hf:qwen3_moe) or "
            "path/to/file.py:factory (a function returning (model, args) or (model, args, kwargs))."
        ),
    ],
    implementation: Annotated[
        str | None,
        typer.Option(
            help="transformers' experts implementation: batched_mm, or grouped_mm (its own choice "
            "for models that have it)."
        ),
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Cast the model and its floating arguments.")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Capture with symbolic sizes, as dynamic=True.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Plan and verify for so many expert-parallel ranks."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit status 1 if a layer may have been missed.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Also write the report as JSON (docs/report.md).")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write the report as an HTML page, with the source of each layer."),
    ] = None,
) -> None:
    """List each MoE layer of a model, and each candidate that was declined with the reason.

    Captures the model and runs it once as it is; compiles nothing and needs no process group.

    Exit status: 0 if an MoE layer was found; 1 if none was, or (--strict) one may be missed;
    2 if the target or an option cannot be used.
    """
    try:
        found = load(target, implementation)
        if dtype is not None:
            found = found.to(getattr(torch, dtype))
        report = explain(
            found.model, *found.args, dynamic=dynamic or None, ranks=ranks, **found.kwargs
        )
    except MoeFxError as error:
        _fail(error)
    report.print(Console())
    if json is not None:
        report.to_json(json)
    if html is not None:
        report.to_html(html)
    raise typer.Exit(0 if report.regions and not (strict and report.missed) else 1)


@app.command("bench")
def bench_command(
    layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Block of transformers; may be repeated. qwen3: many small experts; mixtral: few "
            "big ones; deepseek: with a shared expert. Default: all."
        ),
    ] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Time of exchange over time of compute, set by the width of the experts; may be "
            "repeated. Default: 0.25, 0.5, 1, 2."
        ),
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(
            help="How evenly tokens use experts; may be repeated. zipf: the share of an expert "
            "falls with its rank. Default: both."
        ),
    ] = None,
    backward: Annotated[
        bool | None,
        typer.Option(
            "--backward/--forward",
            help="Only forward + backward, or only forward. Default: both.",
        ),
    ] = None,
    program: Annotated[
        list[str] | None,
        typer.Option(
            help="Program to measure, beside compute, exchange and unoverlapped, which the figures "
            "are made of; may be repeated: hf_eager, hf_compiled, inductor, inductor_cost, auto, "
            "auto_even, chunks1, 2, 4, 8, allgather1, 2, 4, 8. Default: all."
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of each program, in turn; medians count. Default: 7; 3 if --quick."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="One point (qwen3, ratio 1, uniform, forward), unless said otherwise."
        ),
    ] = False,
    json: Annotated[
        Path | None, typer.Option(help="Also write every figure, and the machine, as JSON.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Also write a trace of the first point for ui.perfetto.dev, and beside it a "
            "picture (.svg): compute, exchange and wait of each rank, without overlap and with."
        ),
    ] = None,
) -> None:
    """Measure how much of the exchange hides behind compute, on a slow link.

    The two hosts are network namespaces of this machine; their link is
    limited to 150 Mbit/s (300 at ratio 0.25). Needs root and iproute2
    (without, says so; exit status 0), and no accelerator. Each of these is
    compared with the original block, then all run in turn: compute only,
    exchange only, moe_fx without overlap, transformers' AllToAllEP eager and
    compiled, Inductor's own overlap scheduler, moe_fx in 1, 2, 4 and 8 chunks
    and as it chooses itself; the same by all-gather, and as it chooses if
    promised even numbers of tokens.

    How to read it. bound: the longer of compute and exchange, which no
    program can beat; / bound: 1.00 is perfect; hidden: the share of the time
    lost without overlap that is won back. A program that cannot run here is
    listed with the reason. --quick takes minutes, the whole grid hours; keep
    the machine otherwise idle.

    Exit status: 0; 1 if a program of moe_fx failed or differs from the
    original; 2 if an option cannot be used, or there is no checkout.
    """
    try:
        bench = _from_checkout("tests.bench.overlap")
        points = bench.run(
            bench.select(layer, ratio, routing, backward, rounds, quick, trace, program),
            Console(),
            json,
        )
    except MoeFxError as error:
        _fail(error)
    raise typer.Exit(1 if bench.failures(points or []) else 0)


def _from_checkout(name: str) -> ModuleType:
    """The module ``name`` of the checkout that moe_fx itself was imported from."""
    root = Path(__file__).resolve().parents[1]
    if not (root / f"{name.replace('.', '/')}.py").exists():
        raise MoeFxError(
            f"The benchmark is not part of the installed package, and there is no checkout around "
            f"{Path(__file__).parent}. Clone the project, `pip install -e '.[hf]'` in it, and run "
            "moe-fx bench again."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MoeFxError(
            f"The benchmark cannot be imported: {error}. It needs transformers: "
            "pip install -e '.[hf]' in the checkout."
        ) from None


def _fail(error: MoeFxError) -> Any:
    Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
    raise typer.Exit(2)
