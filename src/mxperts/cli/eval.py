"""``mxperts eval``: perplexity of models, and their divergence from a base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mxperts import models
from mxperts.cli import processes
from mxperts.cli.options import (
    SHIPPED,
    BackendOption,
    DeviceOption,
    DtypeOption,
    OutputOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_model,
    use_threads,
)
from mxperts.cli.output import Table, say, show
from mxperts.evaluation import Evaluation, Windows, compare, plot
from mxperts.evaluation.plot import drawing
from mxperts.evaluation.report import NOTE
from mxperts.evaluation.schemes import parse
from mxperts.formats import Scheme


def evaluate(
    models_: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODELS]...",
            help="Folders or hub ids; the first is the base that the others are compared with. "
            "Default, or the word 'shipped': the model that comes with mxperts.",
            show_default=False,
        ),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Compare one unquantised model with itself in these schemes, quantised on the fly: names separated by "
            "commas, 'common' (17 of them) or 'all' (48; not static fp8, which needs calibrated scales)."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text to evaluate on; default: the shipped model's held-out text."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Use this much of the text; 0: all of it.")] = 16384,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window, at most what the model allows.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from window to window; default: as many as a window has.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw KL divergence against bits a weight to this PNG.")
    ] = None,
    output: OutputOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Measure perplexity, and KL divergence, Δp, top-1 and router agreement against a base model."""
    use_threads(threads)
    if plot_file is not None:
        drawing()
    chosen: Sequence[Scheme] = parse(schemes) if schemes is not None else ()
    paths = [resolve_model(m) for m in models_ or [SHIPPED]]
    if chosen and len(paths) > 1:
        raise typer.BadParameter(f"takes one model, not {len(paths)}", param_hint="--schemes")
    if text is None:
        if not models.is_shipped(paths[0]):
            raise typer.BadParameter("is required unless the model is the shipped one", param_hint="--text")
        text = models.heldout()

    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "trust_remote_code": trust_remote_code,
    }

    def load_all() -> Iterator[tuple[str, Any]]:
        for path in paths:
            yield path_name(path), load_model(path, scheme=None, **options)
        for scheme in chosen:
            yield scheme.name, load_model(paths[0], scheme=scheme.name, **options)

    windows = Windows.of_text(
        text.read_text(encoding="utf-8"),
        load_tokenizer(paths[0], trust_remote_code=trust_remote_code),
        context=min(context, context_limit(paths[0], trust_remote_code=trust_remote_code)),
        stride=stride,
        max_tokens=max_tokens or None,
    )
    report = compare(
        load_all(),
        windows,
        batch_size=batch_size,
        conditions={"models": paths, "text": str(text), **options},
        progress=Progress(len(paths) + len(chosen)),
    )
    header, rows = report.table()
    show(
        Table(header=header, rows=rows, note=NOTE if report.others else ""),
        records=report.records(),
        document=report.document(),
        output=output,
    )
    if plot_file is not None and processes.number() == 0:
        plot(report, plot_file)
        say(f"drawn: {plot_file}")


class Progress:
    """Says on stderr which of ``total`` evaluations is done, and how it came out."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, evaluation: Evaluation) -> None:
        self.done += 1
        kl = f", KLD {evaluation.divergence.kl.value:.6f}" if evaluation.divergence else ""
        say(
            f"[{self.done}/{self.total}] {evaluation.name}: PPL {evaluation.perplexity.value:.4f}{kl}, "
            f"{evaluation.seconds:.1f} s"
        )


def path_name(path: str) -> str:
    """What the report calls a model: a folder's own name, or the hub id."""
    return Path(path).resolve().name if Path(path).exists() else path
