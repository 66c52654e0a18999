"""The command line: ``moe-fx demo``, ``moe-fx explain``, ``moe-fx bench``.

Outside the package moe_fx, which imports torch: ``moe-fx --help`` must not wait for that. So
nothing here imports moe_fx before a command does its work.

Exit status, of every command: 2 if what it was given cannot be used, with one message on standard
error and no traceback; 0 and 1 as its help says.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from types import ModuleType
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

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


def _writable(path: Path | None) -> Path | None:
    """For an option: what cannot be written is known before the work, not after it."""
    if path is not None:
        if not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no folder {str(path.absolute().parent)!r}")
        if path.is_dir():
            raise typer.BadParameter(f"{str(path)!r} is a folder, expected a file")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise typer.BadParameter(f"{str(path)!r} cannot be written")
    return path


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
    with _failing():
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
        typer.Option(callback=_writable, help="Also write the report as JSON (docs/report.md)."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            callback=_writable,
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
    with _failing():
        from moe_fx.cli.target import load

        report = load(target, implementation, dtype).explain(dynamic=dynamic or None, ranks=ranks)
        report.print(Console())
        for path, write in ((json, report.to_json), (html, report.to_html)):
            if path is not None:
                _write(path, write)
    may_be_missed = report.missed or report.hidden
    raise typer.Exit(0 if report.regions and not (strict and may_be_missed) else 1)


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
        Path | None,
        typer.Option(callback=_writable, help="Also write every figure, and the machine, as JSON."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            callback=_writable,
            help="Also write a trace of the first point for ui.perfetto.dev, and beside it a "
            "picture (.svg): compute, exchange and wait of each rank, without overlap and with.",
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
    listed with the reason. --quick takes minutes, the whole grid hours: it
    says how long before it starts. Keep the machine otherwise idle.

    Examples:
      moe-fx bench --quick                        one point: minutes
      moe-fx bench --quick --program auto         the fewest programs
      moe-fx bench --layer mixtral --forward --json figures.json

    Exit status: 0; 1 if a program of moe_fx failed or differs from the
    original; 2 if an option cannot be used, or there is no checkout.
    """
    with _failing():
        bench = _from_checkout("tests.bench.overlap")
        points = bench.run(
            bench.select(layer, ratio, routing, backward, rounds, quick, trace, program),
            Console(),
            json,
        )
    raise typer.Exit(1 if bench.failures(points or []) else 0)


def _from_checkout(name: str) -> ModuleType:
    """The module ``name`` of the checkout that moe_fx itself was imported from."""
    from moe_fx.errors import MoeFxError

    root = Path(__file__).resolve().parents[2]
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


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        _fail(f"{path} cannot be written: {error.strerror}")


@contextmanager
def _failing() -> Iterator[None]:
    """An error that moe_fx raises on purpose, or a torch that it does not work with, ends the
    command with one message."""
    try:
        from moe_fx.errors import MoeFxError
    except ImportError as error:
        _fail(f"moe_fx cannot be imported: {error}")
    try:
        yield
    except MoeFxError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    said = Text.assemble(("error: ", "red"), message)
    console = Console(stderr=True)
    console.print(said, soft_wrap=not console.is_terminal)
    raise typer.Exit(2)
