"""``mxperts eval``: perplexity of models and their divergence from a base, or their scores on tasks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mxperts import models
from mxperts.cli import compared, processes
from mxperts.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    OutputOption,
    ThreadsOption,
    TrustRemoteCodeOption,
    load_tokenizer,
    use_threads,
)
from mxperts.cli.output import Output, Table, say, show
from mxperts.errors import ArgumentError
from mxperts.evaluation import (
    Evaluation,
    Report,
    TaskEvaluation,
    TaskReport,
    compare,
    compare_on_tasks,
    plot,
    write_report,
)
from mxperts.evaluation.page import check_report_file
from mxperts.evaluation.report import LAYER_NOTE
from mxperts.integrations.lm_eval import Harness

TEXT_OPTIONS = ("text", "max_tokens", "context", "stride", "plot_file", "report_file", "base_logits", "layers")
TASK_OPTIONS = ("include_path", "limit", "num_fewshot", "apply_chat_template")
TOP_K = 256
"""Most likely tokens that a file of the base's answers keeps, unless told otherwise."""


def evaluate(
    ctx: typer.Context,
    models_: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODELS]...",
            help="Folders or hub ids; without --base, the first is the base that the others are compared with. "
            "Default, or the word 'shipped': the model that comes with mxperts.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that all others are compared with.", show_default=False)
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Compare the base, unquantised, with itself in these schemes, quantised on the fly: names separated "
            "by commas, 'common' (17 of them) or 'all' (48; not static fp8, which needs calibrated scales)."
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
    report_file: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="HTML",
            help="Write one self-contained page with all figures, pictures and the worst tokens, and the pictures as "
            "PNG files beside it; old ones are replaced. Needs matplotlib: pip install 'mxperts\\[plot]'.",
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also measure the error of every layer and projection, by itself and accumulated; --output csv then "
            "prints these. Takes the base and one model in memory at a time.",
        ),
    ] = False,
    base_logits: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file for the base's answers: written if it does not exist, else read, if it is of this base and "
            "text, instead of running the base.",
        ),
    ] = None,
    base_top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --base-logits, most likely tokens to keep of every distribution beside the mass of the rest, "
            f"which makes KL divergences lower bounds; 0: all. Default: {TOP_K}, or what the file has.",
            show_default=False,
        ),
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
    if base_top_k is not None and base_logits is None:
        raise typer.BadParameter("goes with --base-logits only", param_hint="--base-top-k")
    if layers and processes.count() > 1:
        raise ArgumentError("--layers runs in one process; leave it out, or start the command without torchrun")
    use_threads(threads)
    for picture in (plot_file, report_file):
        if picture is not None:
            check_report_file(picture)
    wanted = compared.wanted(base, models_ or [], schemes)
    if layers and len(wanted) == 1:
        raise typer.BadParameter("compares models with the base; name one, or --schemes", param_hint="--layers")
    if tasks is None and text is None and not models.is_shipped(wanted[0].path):
        raise typer.BadParameter("is required unless the base is the shipped model", param_hint="--text")
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "trust_remote_code": trust_remote_code,
    }
    conditions = {"models": list(dict.fromkeys(row.path for row in wanted)), **options}
    if tasks is not None:
        found = compare_on_tasks(
            (
                (row.name, row.load(options), load_tokenizer(row.path, trust_remote_code=trust_remote_code))
                for row in wanted
            ),
            Harness(
                [task.strip() for task in tasks.split(",")],
                include_path=include_path,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                apply_chat_template=apply_chat_template,
            ),
            conditions=conditions,
            progress=Progress(len(wanted)),
        )
        _show(found, output)
        return

    text = text or models.heldout()
    windows = compared.windows(
        text, wanted, context=context, stride=stride, max_tokens=max_tokens, trust_remote_code=trust_remote_code
    )
    stored, file = None, None
    if base_logits is not None:
        file = compared.base_file(base_logits, wanted[0], base_top_k, options)
        stored = file.load(windows, name=wanted[0].name)
        conditions["base_logits"] = str(base_logits)
        if stored is not None:
            say(f"{wanted[0].name}: not run, its answers are in {base_logits}")
    to_run = wanted if stored is None else wanted[1:]

    def keep(evaluation: Any, baseline: Any) -> None:
        if file is not None and processes.number() == 0:
            file.save(evaluation, baseline, windows)
            say(f"written: {base_logits}, {file.path.stat().st_size / 1e6:.1f} MB")

    report = compare(
        ((row.name, row.load(options)) for row in to_run),
        windows,
        batch_size=batch_size,
        stored=stored,
        keep=keep,
        top_k=0 if file is None else TOP_K if base_top_k is None else base_top_k,
        conditions={"text": str(text), **conditions},
        progress=Progress(len(to_run)),
    )
    if layers:
        report = dataclasses.replace(report, layers=compared.layers(wanted, report, windows, batch_size, options))
    _show(report, output)
    if processes.number() == 0:
        if plot_file is not None:
            plot(report, plot_file)
            say(f"drawn: {plot_file}")
        if report_file is not None:
            page, *pictures = write_report(report, report_file)
            say(f"written: {page}, and {len(pictures)} pictures {page.stem}-*.png beside it")


def _show(report: Report | TaskReport, output: Output | None) -> None:
    """Print the table, and that of the layers if there is one."""
    header, rows = report.table()
    layers = report.layers if isinstance(report, Report) else ()
    table = Table(header=header, rows=rows, left=report.LEFT, note=report.note)
    records = report.layer_records() if isinstance(report, Report) and layers else report.records()
    show(table, records=records, document=report.document(), output=output)
    if isinstance(report, Report) and layers and output in (None, Output.MD):
        header, rows = report.layer_table()
        print()
        table = Table(header=header, rows=rows, left=2, note=LAYER_NOTE)
        show(table, records=(), document={}, output=output)


class Progress:
    """Says on stderr which of ``total`` evaluations is done, and how it came out."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, evaluation: Evaluation | TaskEvaluation) -> None:
        self.done += 1
        say(f"[{self.done}/{self.total}] {evaluation.name}: {evaluation.summary()}, {evaluation.seconds:.1f} s")
