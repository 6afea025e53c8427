"""``mxperts quantize``: from an unquantised checkpoint to an MX checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxperts.checkpoint.inspect import KINDS
from mxperts.cli.options import Layout, OutputOption, resolve_model
from mxperts.cli.output import Table, show
from mxperts.cli.progress import Progress, resumable
from mxperts.quantization import quantize_checkpoint


def quantize(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder of an unquantised checkpoint in safetensors; 'shipped': the model that comes with mxperts."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    scheme: Annotated[str, typer.Option(help="Weights and activations, e.g. w_mxfp4_a_mxfp4 or w4a16.")] = "w_mxfp4",
    format: Annotated[Layout, typer.Option("--format", help="The layout to write.")] = Layout.QUARK,
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
    rotate: Annotated[
        str | None,
        typer.Option(
            metavar="ROTATION",
            help="hadamard32: rotate blocks of weights, and of inputs at run time; only mxperts runs the result.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    output: OutputOption = None,
) -> None:
    """Quantise a checkpoint file by file.

    AMD Quark's layout, which vLLM reads too, has words for every scheme; what another has none for is refused. An
    interrupted run goes on where it was when the same command is given again.
    """
    with resumable(dst, dry_run=dry_run):
        summary = quantize_checkpoint(
            resolve_model(src),
            dst,
            scheme,
            format=format.value,
            exclude=exclude or None,
            layer_schemes=dict(_layer(text) for text in layer or ()),
            preset=preset,
            scale_rule=scale_rule,
            rotation=rotate,
            progress=Progress(),
            dry_run=dry_run,
        )
    before, after = summary.bytes_before, summary.bytes_after
    records = [{"kind": kind, "bytes_before": before[kind], "bytes_after": after[kind]} for kind in KINDS]
    sizes = [(kind, before[kind], after[kind]) for kind in KINDS]
    sizes.append(("all", sum(before.values()), sum(after.values())))
    rows = [[kind, f"{b / 1e6:.3f}", f"{a / 1e6:.3f}", f"{b / a:.2f}x" if a else ""] for kind, b, a in sizes]
    what = f"{summary.scheme}, rotated by {rotate}" if rotate else f"{summary.scheme}"
    note = (
        f"{what}: {summary.modules} layers quantised, {len(summary.excluded)} left as they are; "
        f"{'would be ' if dry_run else ''}written to {dst}"
    )
    show(
        Table(header=["kind", "MB before", "MB after", "smaller"], rows=rows, note=note),
        records=records,
        document={
            "dst": str(dst),
            "dry_run": dry_run,
            "scheme": summary.scheme.name,
            "format": summary.format,
            "rotation": rotate,
            "modules": summary.modules,
            "excluded": list(summary.excluded),
            "bytes_before": dict(before),
            "bytes_after": dict(after),
            "resumed": summary.resumed,
        },
        output=output,
    )


def _layer(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not PATTERN=SCHEME", param_hint="--layer")
    return pattern, scheme
