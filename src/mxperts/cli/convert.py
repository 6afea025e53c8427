"""``mxperts convert``: from one layout of MX checkpoints to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mxperts.checkpoint import convert_checkpoint
from mxperts.checkpoint.convert import MAX_SHARD_SIZE
from mxperts.checkpoint.inspect import KINDS
from mxperts.cli.options import Layout, OutputOption
from mxperts.cli.output import Table, show
from mxperts.cli.progress import Progress, resumable


def convert(
    src: Annotated[Path, typer.Argument(help="Folder of an MX checkpoint.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    format: Annotated[Layout, typer.Option("--format", help="The layout to write.", show_default=False)],
    max_shard_size: Annotated[str, typer.Option(help="Largest file to write.")] = MAX_SHARD_SIZE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be written.")] = False,
    output: OutputOption = None,
) -> None:
    """Write an MX checkpoint in the layout of other software: new names and config, the same bytes.

    What that layout has no words for is refused by name. An interrupted run goes on where it was when the same command
    is given again.
    """
    with resumable(dst, dry_run=dry_run):
        done = convert_checkpoint(
            src, dst, format.value, max_shard_size=max_shard_size, progress=Progress(), dry_run=dry_run
        )
    before, after = done.bytes_before, done.bytes_after
    records = [{"kind": kind, "bytes_before": before[kind], "bytes_after": after[kind]} for kind in KINDS]
    sizes = [(kind, before[kind], after[kind]) for kind in KINDS]
    sizes.append(("all", sum(before.values()), sum(after.values())))
    schemes = ", ".join(f"{count} weights in {scheme}" for scheme, count in done.schemes.items())
    note = (
        f"{done.source} to {done.format}: {schemes}; {'would be ' if dry_run else ''}written to {dst}, "
        f"{done.files} file{'s' * (done.files > 1)}"
    )
    show(
        Table(
            header=["kind", "MB before", "MB after"],
            rows=[[kind, f"{b / 1e6:.3f}", f"{a / 1e6:.3f}"] for kind, b, a in sizes],
            note=note,
        ),
        records=records,
        document={
            "dst": str(dst),
            "dry_run": dry_run,
            "source": done.source,
            "format": done.format,
            "schemes": dict(done.schemes),
            "files": done.files,
            "bytes_before": dict(before),
            "bytes_after": dict(after),
            "resumed": done.resumed,
        },
        output=output,
    )
