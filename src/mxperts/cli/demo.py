"""``mxperts demo``: the whole job on the shipped model, in minutes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mxperts import models
from mxperts.cli.eval import Progress
from mxperts.cli.generate import Sampling, continue_text
from mxperts.cli.options import DtypeOption, ThreadsOption, context_limit, load_model, load_tokenizer, use_threads
from mxperts.cli.output import Table, say, show, to_csv, to_json
from mxperts.errors import MxpertsError
from mxperts.evaluation import Windows, compare, plot
from mxperts.evaluation.report import NOTE
from mxperts.evaluation.schemes import ALL
from mxperts.quantization import quantize_checkpoint

PROMPT = "KING RICHARD.\n"
SAMPLED = (None, "w_mxfp4", "w_mxfp4_a_mxfp4")
"""Schemes whose text is shown; None is the unquantised model."""


def demo(
    folder: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Where checkpoints and results go; old ones are replaced.")
    ] = Path("mxperts-demo"),
    max_tokens: Annotated[int, typer.Option(min=1024, help="Evaluate on this much of the held-out text.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, max=256, help="Length of the generated samples.")] = 64,
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Quantise the shipped model to every scheme, load each packed, evaluate all, and write some text."""
    start = time.perf_counter()
    use_threads(threads)
    source, checkpoints = models.shipped(), folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for scheme in ALL:
        target = checkpoints / scheme.name
        if target.exists():
            shutil.rmtree(target)
        quantize_checkpoint(source, target, scheme)
    say(f"{len(ALL)} checkpoints written to {checkpoints} in {time.perf_counter() - start:.1f} s")

    tokenizer = load_tokenizer(str(source), trust_remote_code=False)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    samples: dict[str, str] = {}

    def load_all() -> Iterator[tuple[str, Any]]:
        for scheme in (None, *(s.name for s in ALL)):
            name = scheme or "unquantised"
            path = source if scheme is None else checkpoints / scheme
            model = load_model(
                str(path), scheme=None, dtype=dtype, device="cpu", backend="auto", trust_remote_code=False
            )
            if scheme in SAMPLED:
                tokens = continue_text(model, prompt, max_new_tokens=new_tokens, sampling=Sampling())
                samples[name] = tokenizer.decode(tokens[0], skip_special_tokens=True)
            yield name, model

    windows = Windows.of_text(
        models.heldout().read_text(encoding="utf-8"),
        tokenizer,
        context=context_limit(str(source), trust_remote_code=False),
        max_tokens=max_tokens,
    )
    report = compare(
        load_all(),
        windows,
        conditions={"model": str(source), "text": models.heldout().name, "dtype": dtype},
        progress=Progress(1 + len(ALL)),
    )
    header, rows = report.table()
    table = Table(header=header, rows=rows, note=NOTE)
    (folder / "table.md").write_text(table.markdown(), encoding="utf-8")
    (folder / "table.csv").write_text(to_csv(report.records()), encoding="utf-8")
    (folder / "table.json").write_text(to_json(report.document()), encoding="utf-8")
    show(table, records=report.records(), document=report.document(), output=None)
    for name, text in samples.items():
        print(f"\n### {name}\n\n{text.strip()}")
    try:
        plot(report, folder / "kl.png")
    except MxpertsError as error:
        say(f"no figure: {error}")
    say(
        f"done in {time.perf_counter() - start:.0f} s; table.md, table.csv, table.json and kl.png are in {folder}, "
        f"checkpoints in {checkpoints}"
    )
