"""The command line: ``moe-fx demo``, ``moe-fx explain``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from moe_fx.demo import DEFAULT_MODELS, run_demo
from moe_fx.errors import ConfigurationError, MoeFxError
from moe_fx.explain import explain
from moe_fx.tiny import tiny_model

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
        str, typer.Option(help="transformers' experts implementation: grouped_mm or batched_mm.")
    ] = "grouped_mm",
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as an HTML page.")
    ] = None,
) -> None:
    """List each MoE layer of a model, and each candidate that was declined with the reason.

    Captures the model and runs it once as it is; compiles nothing and needs no process group.
    """
    try:
        model, args, kwargs = _load(target, implementation)
        report = explain(model, *args, **kwargs)
    except MoeFxError as error:
        _fail(error)
    report.print(Console())
    if json is not None:
        report.to_json(json)
    if html is not None:
        report.to_html(html)


def _load(target: str, implementation: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    kind, _, name = target.rpartition(":")
    if kind == "hf":
        model = tiny_model(name, experts_implementation=implementation)
        ids = torch.randint(model.config.vocab_size, (1, 12))
        return model, (), {"input_ids": ids, "use_cache": False}
    file = Path(kind)
    if not file.is_file():
        raise ConfigurationError(
            f"There is no file {kind!r}. Give hf:MODEL_TYPE, such as hf:qwen3_moe, or "
            "path/to/file.py:factory."
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{kind!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigurationError(f"{kind!r} has no function {name!r}.")
    model, args, *rest = factory()
    return model, tuple(args), dict(rest[0]) if rest else {}


def _fail(error: MoeFxError) -> Any:
    Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
    raise typer.Exit(2)
