"""``mxperts quantize``: from an unquantised checkpoint to an MX checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mxperts.checkpoint.inspect import KINDS
from mxperts.checkpoint.writer import partial_folder
from mxperts.cli.options import OutputOption, resolve_model
from mxperts.cli.output import Table, say, show
from mxperts.quantization import quantize_checkpoint

_EVERY = 2.0
"""Seconds between two lines of progress."""


def quantize(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder of an unquantised checkpoint in safetensors; 'shipped': the model that comes with mxperts."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    scheme: Annotated[str, typer.Option(help="Weights and activations, e.g. w_mxfp4_a_mxfp4 or w4a16.")] = "w_mxfp4",
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to leave as they are: a name, a glob or re:…; may be repeated. Default: all but the "
            "projections of MLPs and experts. Embeddings and routers are never quantised.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SCHEME", help="Another scheme for some layers; may be repeated.", show_default=False
        ),
    ] = None,
    scale_rule: Annotated[
        str | None, typer.Option(help="floor, even, rceil, ceil or rfloor instead of the preset's.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Whose numbers: quark, vllm, ocp, torchao …")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    output: OutputOption = None,
) -> None:
    """Quantise a checkpoint file by file into AMD Quark's layout, which vLLM reads too.

    An interrupted run goes on where it was when the same command is given again.
    """
    partial = partial_folder(dst)
    if partial.exists() and not dry_run:
        say(f"going on from {partial}, which an interrupted run left")
    try:
        summary = quantize_checkpoint(
            resolve_model(src),
            dst,
            scheme,
            exclude=exclude or None,
            layer_schemes=dict(_layer(text) for text in layer or ()),
            preset=preset,
            scale_rule=scale_rule,
            progress=Progress(),
            dry_run=dry_run,
        )
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {partial}")
        raise
    before, after = summary.bytes_before, summary.bytes_after
    records = [{"kind": kind, "bytes_before": before[kind], "bytes_after": after[kind]} for kind in KINDS]
    sizes = [(kind, before[kind], after[kind]) for kind in KINDS]
    sizes.append(("all", sum(before.values()), sum(after.values())))
    rows = [[kind, f"{b / 1e6:.3f}", f"{a / 1e6:.3f}", f"{b / a:.2f}x" if a else ""] for kind, b, a in sizes]
    note = (
        f"{summary.scheme}: {summary.modules} layers quantised, {len(summary.excluded)} left as they are; "
        f"{'would be ' if dry_run else ''}written to {dst}"
    )
    show(
        Table(header=["kind", "MB before", "MB after", "smaller"], rows=rows, note=note),
        records=records,
        document={
            "dst": str(dst),
            "dry_run": dry_run,
            "scheme": summary.scheme.name,
            "modules": summary.modules,
            "excluded": list(summary.excluded),
            "bytes_before": dict(before),
            "bytes_after": dict(after),
            "resumed": summary.resumed,
        },
        output=output,
    )


class Progress:
    """Says on stderr, now and then, how far the work is and how long the rest will take."""

    def __init__(self) -> None:
        self.start = self.said = time.monotonic()
        self.begun_at: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.begun_at is None:
            self.begun_at, self.start = done, now
        if now - self.said >= _EVERY and done > self.begun_at:
            self.said = now
            left = (now - self.start) * (total - done) / (done - self.begun_at)
            say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, about {left:.0f} s left")


def _layer(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not PATTERN=SCHEME", param_hint="--layer")
    return pattern, scheme
