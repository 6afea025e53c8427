"""``mxperts inspect``: what a checkpoint holds, from its headers, or with ``--deep`` from all its numbers."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mxperts.checkpoint import Inspection, inspect_checkpoint
from mxperts.checkpoint.inspect import KINDS
from mxperts.cli.options import OutputOption, resolve_model
from mxperts.cli.output import Table, show


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of a checkpoint; 'shipped': the model that comes with mxperts.")
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read all tensors too and report NaN, Inf, odd scales and empty blocks.")
    ] = False,
    output: OutputOption = None,
) -> None:
    """Check a checkpoint and show its schemes, layer by layer, and its size."""
    found = inspect_checkpoint(resolve_model(checkpoint), check=deep)
    document = dataclasses.asdict(found) | {
        "path": str(found.path),
        "bits_per_value": {kind: found.bits_per_value(kind) for kind in KINDS} | {"all": found.bits_per_value()},
    }
    rows = [
        [g.modules, g.scheme, g.layers, str(g.count), _mb(g.nbytes), f"{8 * g.nbytes / g.values:.3f}"]
        for g in found.groups
    ]
    for kind in KINDS:
        rows.append([f"all {kind}", "", "", "", _mb(found.nbytes[kind]), f"{found.bits_per_value(kind):.3f}"])
    rows.append(["all", "", "", str(found.tensors), _mb(sum(found.nbytes.values())), f"{found.bits_per_value():.3f}"])
    show(
        Table(
            header=["weights", "scheme", "layers", "count", "MB", "bits/value"], rows=rows, left=3, note=_note(found)
        ),
        records=[dataclasses.asdict(group) for group in found.groups],
        document=document,
        output=output,
    )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3f}"


def _note(found: Inspection) -> str:
    lines = [
        f"{found.path}: {found.layout or 'no MX'} layout, model type {found.model_type or 'unknown'}, {found.tensors} "
        f"tensors in {found.files} files; the last line counts tensors."
    ]
    if found.rotation is not None:
        lines.append(f"Quantised weights are rotated by {found.rotation}; their inputs are at run time.")
    if found.anomalies is not None:
        lines += [f"{a.tensor}: {a.count} {a.what}" for a in found.anomalies] or ["Nothing odd in the numbers."]
    return "\n".join(lines)
