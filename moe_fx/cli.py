"""The command line: ``moe-fx demo``, ``moe-fx explain``."""

from __future__ import annotations

from pathlib import Path
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


def _fail(error: MoeFxError) -> Any:
    Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
    raise typer.Exit(2)
