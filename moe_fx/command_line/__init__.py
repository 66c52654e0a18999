"""The command line: ``moe-fx demo``, ``moe-fx explain``, ``moe-fx bench``.

Outside the package moe_fx, which imports torch: ``moe-fx --help`` must not wait for that. So
nothing here imports moe_fx before a command does its work.

Exit status, of every command: 2 if what it was given cannot be used, with one message on standard
error and no traceback; 0 and 1 as its help says.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Annotated, Literal

import typer
from rich.console import Console

from moe_fx_cli.bench import bench_command
from moe_fx_cli.refusing import failing, writable, write

__all__ = ["app"]

DType = Literal["float32", "float64", "bfloat16", "float16"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    found = [f"moe-fx {version('moe-fx')}"]
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    print(f"{', '.join(found)}, Python {python_version()}")
    raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of moe_fx and what it works with.",
        ),
    ] = False,
) -> None:
    """Turn a Mixture-of-Experts model into an expert-parallel program, by compiler pass.

    Start here:

      moe-fx demo                      see it work, on two ranks of this machine
      moe-fx explain hf:qwen3_moe      which MoE layers does it find in a model?
      moe-fx explain my.py:make_model  and in mine?

    Then, in your own program: torch.compile(model, backend="moe_fx").
    """


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

    Starts its own ranks (Gloo), loads each model with transformers' loader so
    that a rank holds only its experts, compiles with backend="moe_fx",
    generates from another prompt on each rank and compares every token with
    the unmodified model. Needs transformers (pip install 'moe-fx\\[hf]'), no
    accelerator.

    Examples:
      moe-fx demo                            two models on two ranks: minutes
      moe-fx demo --base eager               without Inductor: quicker
      moe-fx demo --ranks 4 --model gpt_oss  another family, on four ranks

    Exit status: 0; 1 if anything differs from the original; 2 if an option
    cannot be used.
    """
    with failing():
        from moe_fx.cli.demo import DEFAULT_MODELS, run_demo

        passed = run_demo(tuple(model or DEFAULT_MODELS), ranks, tokens, base, Console())
    raise typer.Exit(0 if passed else 1)


@app.command("explain")
def explain_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="hf:MODEL_TYPE (a small model of that transformers family, as in hf:qwen3_moe) or "
            "path/to/file.py:factory (a function that returns (model, args) or "
            "(model, args, kwargs)).",
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
        DType | None,
        typer.Option(
            metavar="DTYPE",
            help="Cast the model and its floating arguments: float32, float64, bfloat16, float16.",
        ),
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
        Path | None,
        typer.Option(callback=writable, help="Also write the report as JSON (docs/report.md)."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=writable,
            help="Also write the report as an HTML page, with the source of each layer.",
        ),
    ] = None,
) -> None:
    """List each MoE layer of a model, and each candidate that was declined with the reason.

    Captures the model and runs it once as it is; compiles nothing and needs
    no process group.

    Examples:
      moe-fx explain hf:deepseek_v3 --ranks 4     a family of transformers
      moe-fx explain my.py:make --html page.html  yours, with its source
      moe-fx explain my.py:make --strict          fails if one may be missed

    Here my.py has:
      def make():
          return MyModel(), (torch.randn(8, 64),)

    Exit status: 0 if an MoE layer was found; 1 if none was, or (--strict) one
    may be missed; 2 if the target or an option cannot be used.
    """
    with failing():
        from moe_fx.cli.target import load

        report = load(target, implementation, dtype).explain(dynamic=dynamic or None, ranks=ranks)
        report.print(Console())
        for path, how in ((json, report.to_json), (html, report.to_html)):
            if path is not None:
                write(path, how)
    may_be_missed = report.missed or report.hidden
    raise typer.Exit(0 if report.regions and not (strict and may_be_missed) else 1)


app.command("bench")(bench_command)
