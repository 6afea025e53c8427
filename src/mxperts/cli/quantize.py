"""``mxperts quantize``: from an unquantised checkpoint to an MX checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mxperts.checkpoint.inspect import KINDS
from mxperts.cli.options import (
    BackendOption,
    DeviceOption,
    Layout,
    OutputOption,
    TrustRemoteCodeOption,
    resolve_model,
)
from mxperts.cli.output import Table, show
from mxperts.cli.progress import Progress, resumable
from mxperts.errors import ArgumentError
from mxperts.quantization import quantize_checkpoint
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.calibration.text import CONTEXT, MEMORY, TOKENS
from mxperts.quantization.choice import RTN, Methods
from mxperts.quantization.recipe import read_recipe

_NAMED = 5
"""How many layers with too few inputs the table's note names; ``--output json`` names all."""


def quantize(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder of an unquantised checkpoint in safetensors; 'shipped': the model that comes with mxperts."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="Weights and activations, e.g. w_mxfp4_a_mxfp4 or w4a16; default: w_mxfp4."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How codes and scales are chosen: rtn, scale-search or gptq; default: rtn."),
    ] = None,
    smooth: Annotated[
        bool | None,
        typer.Option("--smooth/--no-smooth", help="Even out channels first, by powers of two.", show_default=False),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="Mix MXFP4, MXFP6 and MXFP8 weights by measured error, to so many bits a weight: e.g. 4.75."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="What to calibrate on: a text file, a folder of .txt files, or token ids in .json or .npy. Default "
            "for the model that comes with mxperts: a text that it was trained on.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help=f"How many tokens of it; default: {TOKENS}, or all.", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens in a window; default: {CONTEXT}, or the model's limit.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which part of a longer text; default: 0.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A TOML file with these options as keys, and rules for layers; options given here win."),
    ] = None,
    format: Annotated[
        Layout | None, typer.Option("--format", help="The layout to write; default: quark.", show_default=False)
    ] = None,
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
    memory: Annotated[
        float, typer.Option(min=0, help="GiB that quantising some experts at a time may take, about.")
    ] = MEMORY / 2**30,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
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
    """Quantise a checkpoint.

    Rounding to nearest goes file by file and needs no text. gptq runs the model over a text, one layer in memory at a
    time, and fits every weight to its inputs: see docs/quantization.md.

    AMD Quark's layout, which vLLM reads too, has words for every scheme; what another has none for is refused. An
    interrupted run goes on where it was when the same command is given again.

    For example: mxperts quantize Qwen3-30B-A3B out --scheme w4a16 --method gptq --text corpus.txt --tokens 131072
    """
    settings: dict[str, Any] = {} if recipe is None else read_recipe(recipe)
    given = {
        "scheme": scheme,
        "method": method,
        "smooth": smooth,
        "bits": bits,
        "text": text,
        "tokens": tokens,
        "context": context,
        "seed": seed,
        "format": None if format is None else format.value,
        "exclude": exclude or None,
        "layer_schemes": dict(_layer(rule) for rule in layer) if layer else None,
        "scale_rule": scale_rule,
        "preset": preset,
        "rotation": rotate,
    }
    settings |= {key: value for key, value in given.items() if value is not None}
    settings = {"scheme": "w_mxfp4", "format": Layout.QUARK.value} | settings
    calibration = _calibration(
        settings, device=device, backend=backend, memory=int(memory * 2**30), trust_remote_code=trust_remote_code
    )
    with resumable(dst, dry_run=dry_run):
        summary = quantize_checkpoint(
            resolve_model(src), dst, calibration=calibration, progress=Progress(), dry_run=dry_run, **settings
        )
    before, after = summary.bytes_before, summary.bytes_after
    records = [{"kind": kind, "bytes_before": before[kind], "bytes_after": after[kind]} for kind in KINDS]
    sizes = [(kind, before[kind], after[kind]) for kind in KINDS]
    sizes.append(("all", sum(before.values()), sum(after.values())))
    rows = [[kind, f"{b / 1e6:.3f}", f"{a / 1e6:.3f}", f"{b / a:.2f}x" if a else ""] for kind, b, a in sizes]
    rotation = settings.get("rotation")
    what = f"{summary.scheme}, rotated by {rotation}" if rotation else f"{summary.scheme}"
    note = (
        f"{what}: {summary.modules} layers quantised, {len(summary.excluded)} left as they are; "
        f"{'would be ' if dry_run else ''}written to {dst}"
    )
    if summary.few_inputs:
        note += f"; {_few(summary.few_inputs)}"
    show(
        Table(header=["kind", "MB before", "MB after", "smaller"], rows=rows, note=note),
        records=records,
        document={
            "dst": str(dst),
            "dry_run": dry_run,
            "scheme": summary.scheme.name,
            "format": settings["format"],
            "rotation": settings.get("rotation"),
            "modules": summary.modules,
            "excluded": list(summary.excluded),
            "bytes_before": dict(before),
            "bytes_after": dict(after),
            "resumed": summary.resumed,
            "few_inputs": list(summary.few_inputs),
        },
        output=output,
    )


def _layer(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not PATTERN=SCHEME", param_hint="--layer")
    return pattern, scheme


def _calibration(settings: dict[str, Any], *, device: str, **options: Any) -> Calibration | None:
    """What is asked for of a text, taken out of the settings; None if nothing needs one."""
    asked = {key: settings.pop(key) for key in ("text", "tokens", "context", "seed") if key in settings}
    methods = Methods(default=settings.get("method", RTN), layers=settings.get("layer_methods", {}))
    if "text" not in asked and not (methods.need_text or settings.get("smooth") or "bits" in settings):
        if asked:
            raise ArgumentError(
                f"{' and '.join(asked)}: nothing is calibrated; name a text, or a method that needs one"
            )
        return None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Calibration(**asked, device=device, **options)


def _few(modules: Sequence[str]) -> str:
    """Layers that were not fitted to inputs, the first few of them by name."""
    names = ", ".join(modules[:_NAMED]) + (" …" if len(modules) > _NAMED else "")
    return f"{len(modules)} layers had too few inputs in the text and were quantised without: {names}"
