"""``mxperts eval``: perplexity of models and their divergence from a base, or their scores on tasks."""

from __future__ import annotations

from collections.abc import Sequence
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
from mxperts.evaluation import (
    Evaluation,
    Report,
    TaskEvaluation,
    TaskReport,
    Windows,
    compare,
    compare_on_tasks,
    plot,
)
from mxperts.evaluation.plot import drawing
from mxperts.evaluation.schemes import parse
from mxperts.formats import Scheme
from mxperts.integrations.lm_eval import Harness

TEXT_OPTIONS = ("text", "max_tokens", "context", "stride", "plot_file")
TASK_OPTIONS = ("include_path", "limit", "num_fewshot", "apply_chat_template")


def evaluate(
    ctx: typer.Context,
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
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of a text, tasks of lm-eval (pip install 'mxperts\\[eval]'): names or globs, separated by "
            "commas."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder with tasks of your own.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Documents a task, or, below 1, their share; to try things out.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt; default: as the task says.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Make chats of the tasks' prompts.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or requests, a forward pass.")] = 8,
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
    """Measure perplexity, and KL divergence, Δp, top-1 and router agreement against a base model.

    With --tasks: scores on tasks of lm-eval instead, beside the base model's.
    """
    for name in TASK_OPTIONS if tasks is None else TEXT_OPTIONS:
        if ctx.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
            option = f"--{name.removesuffix('_file').replace('_', '-')}"
            raise typer.BadParameter(f"goes {'with' if tasks is None else 'without'} --tasks only", param_hint=option)
    use_threads(threads)
    if plot_file is not None:
        drawing()
    chosen: Sequence[Scheme] = parse(schemes) if schemes is not None else ()
    paths = [resolve_model(m) for m in models_ or [SHIPPED]]
    if chosen and len(paths) > 1:
        raise typer.BadParameter(f"takes one model, not {len(paths)}", param_hint="--schemes")
    if tasks is None and text is None and not models.is_shipped(paths[0]):
        raise typer.BadParameter("is required unless the model is the shipped one", param_hint="--text")
    wanted: list[tuple[str, str, str | None]] = [
        *((path_name(path), path, None) for path in paths),
        *((scheme.name, paths[0], scheme.name) for scheme in chosen),
    ]
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "trust_remote_code": trust_remote_code,
    }
    progress = Progress(len(wanted))
    report: Report | TaskReport
    if tasks is not None:
        report = compare_on_tasks(
            (
                (
                    name,
                    load_model(path, scheme=scheme, **options),
                    load_tokenizer(path, trust_remote_code=trust_remote_code),
                )
                for name, path, scheme in wanted
            ),
            Harness(
                [task.strip() for task in tasks.split(",")],
                include_path=include_path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                apply_chat_template=apply_chat_template,
            ),
            conditions={"models": paths, **options},
            progress=progress,
        )
    else:
        text = text or models.heldout()
        windows = Windows.of_text(
            text.read_text(encoding="utf-8"),
            load_tokenizer(paths[0], trust_remote_code=trust_remote_code),
            context=min(context, context_limit(paths[0], trust_remote_code=trust_remote_code)),
            stride=stride,
            max_tokens=max_tokens or None,
        )
        report = compare(
            ((name, load_model(path, scheme=scheme, **options)) for name, path, scheme in wanted),
            windows,
            batch_size=batch_size,
            conditions={"models": paths, "text": str(text), **options},
            progress=progress,
        )
    header, rows = report.table()
    show(
        Table(header=header, rows=rows, left=report.LEFT, note=report.note),
        records=report.records(),
        document=report.document(),
        output=output,
    )
    if plot_file is not None and isinstance(report, Report) and processes.number() == 0:
        plot(report, plot_file)
        say(f"drawn: {plot_file}")


class Progress:
    """Says on stderr which of ``total`` evaluations is done, and how it came out."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, evaluation: Evaluation | TaskEvaluation) -> None:
        self.done += 1
        say(f"[{self.done}/{self.total}] {evaluation.name}: {evaluation.summary()}, {evaluation.seconds:.1f} s")


def path_name(path: str) -> str:
    """What the report calls a model: a folder's own name, or the hub id."""
    return Path(path).resolve().name if Path(path).exists() else path
