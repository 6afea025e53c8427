"""The commands and the errors they end in."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mxperts
from mxperts.cli import processes
from mxperts.cli.bench import bench
from mxperts.cli.chat import chat
from mxperts.cli.convert import convert
from mxperts.cli.demo import demo
from mxperts.cli.doctor import doctor
from mxperts.cli.eval import evaluate
from mxperts.cli.generate import generate
from mxperts.cli.inspect import inspect
from mxperts.cli.quantize import quantize
from mxperts.cli.serve import ServeCommand, serve
from mxperts.cli.verify import verify
from mxperts.errors import ArgumentError, MxpertsError


class _Commands(TyperGroup):
    """Commands whose errors end in one message on stderr and exit code 1; ``--debug`` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MxpertsError, OSError, ImportError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            processes.complain(f"error: {error}")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="mxperts",
    cls=_Commands,
    help="Run, quantise and evaluate MX mixture-of-experts models on hardware without native MX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mxperts {mxperts.__version__}")
        raise typer.Exit


IN_PROCESSES = ("generate", "eval", "bench")
"""Commands that torchrun may start."""


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    if processes.count() > 1 and ctx.invoked_subcommand not in IN_PROCESSES:
        raise ArgumentError(
            f"`mxperts {ctx.invoked_subcommand}` runs in one process; start it without torchrun, which is for "
            + ", ".join(IN_PROCESSES)
        )


app.command(epilog='Example: mxperts generate --prompt "KING RICHARD." --scheme w4a16 --max-new-tokens 60')(generate)
app.command(epilog="Example: mxperts chat my-mxfp4 --system 'Answer in one sentence.'")(chat)
app.command(cls=ServeCommand, epilog="Example: mxperts serve my-mxfp4 --port 8080 --continuous-batching")(serve)
app.command("eval", epilog="Example: mxperts eval --schemes w4a16,w4a4 --max-tokens 4096 --report out.html")(evaluate)
app.command(epilog="Example: mxperts quantize path/to/model my-mxfp4 --scheme w_mxfp4_a_mxfp4")(quantize)
app.command(epilog="Example: mxperts convert my-mxfp4 my-mxfp4-ct --format compressed-tensors")(convert)
app.command(epilog="Example: mxperts inspect my-mxfp4 --deep")(inspect)
app.command(epilog="Example: mxperts verify, or: mxperts verify my-mxfp4 --source path/to/model")(verify)
app.add_typer(bench, name="bench")
app.command(epilog="Example: mxperts demo --dir mxperts-demo")(demo)
app.command(epilog="Example: mxperts doctor --output json")(doctor)


def main() -> None:
    """The console script: as ``app``, and errors that nobody foresaw end in one message too."""
    with processes.together():
        try:
            app(prog_name="mxperts")
        except Exception as error:
            if "--debug" in sys.argv:
                processes.complain(traceback.format_exc())
            else:
                kind = type(error).__name__
                processes.complain(f"internal error: {kind}: {error}; `mxperts --debug …` shows where")
            sys.exit(1)
