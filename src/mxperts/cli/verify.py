"""``mxperts verify``: whether the numbers are right on this machine, or in a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mxperts.cli.options import DeviceOption, OutputOption, ThreadsOption, resolve_model, use_threads
from mxperts.cli.output import Output, Table, say, show
from mxperts.cli.progress import EVERY
from mxperts.cli.progress import Progress as BytesProgress
from mxperts.verification import cases, exact, golden
from mxperts.verification.checkpoint import Severity, verify_checkpoint
from mxperts.verification.exact import ALL, Check


def verify(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint to check; 'shipped': the model that comes with mxperts. "
            "Default: check this machine.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="The unquantised checkpoint: compare every code and scale with what a preset gives from it."),
    ] = None,
    preset: Annotated[str, typer.Option(help="quark, vllm, ocp, torchao …, or all.")] = ALL,
    format: Annotated[str, typer.Option("--format", help="Of this machine's tests: mxfp4, mxint8 …, or all.")] = ALL,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, gpu, or all that run here.")] = "auto",
    device: DeviceOption = "auto",
    export: Annotated[
        Path | None,
        typer.Option(help="Write the inputs and exact answers of the tests to a new folder instead of running them."),
    ] = None,
    threads: ThreadsOption = None,
    output: OutputOption = None,
) -> None:
    """Compare this machine's bits with golden ones, operation by operation; or check a checkpoint's tensors.

    Exit code 1 if a bit differs, if the checkpoint has errors, or if it is not what the named preset gives.
    """
    use_threads(threads)
    presets = exact.named_presets(preset)
    if checkpoint is not None:
        _refuse("a checkpoint", {"--format": format != ALL, "--export": export is not None})
        if source is None:
            given = {"--preset": preset != ALL, "--backend": backend != "auto", "--device": device != "auto"}
            _refuse("a checkpoint without --source", given)
        _verify_checkpoint(checkpoint, source, presets, backend, device, output)
        return
    _refuse("this machine, without a checkpoint", {"--source": source is not None})
    formats = exact.named_formats(format)
    if export is not None:
        _refuse("an export", {"--backend": backend != "auto", "--device": device != "auto"})
        golden.write(export, cases.cases(formats, presets), say)
        return
    checks = [
        check
        for place in exact.places(backend, device)
        for check in exact.verify(place, formats=formats, presets=presets, progress=Progress(place))
    ]
    records = [dataclasses.asdict(check) for check in checks]
    wrong = sum(check.wrong for check in checks)
    numbers = sum(check.numbers for check in checks)
    note = f"{numbers} numbers compared bit by bit; {wrong or 'none'} of them {'is' if wrong == 1 else 'are'} wrong."
    show(
        Table(header=_HEADER, rows=list(_rows(checks)), left=4, note=note),
        records=records,
        document={"numbers": numbers, "wrong": wrong, "checks": records},
        output=output,
    )
    if wrong:
        raise typer.Exit(1)


_FINDINGS = ["severity", "tensor", "expected", "found"]
_HEADER = ["backend", "format", "operation", "presets, or activations", "numbers", "wrong", "first"]


def _rows(checks: Sequence[Check]) -> Iterator[list[str]]:
    """A row for each operation and format; what is wrong has a row of its own."""

    def row_of(check: Check) -> tuple[str, ...]:
        own = f"{check.preset}{check.activation}" if check.wrong else ""
        return f"{check.backend} on {check.device}", check.format, check.operation, own

    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in checks:
        groups.setdefault(row_of(check), []).append(check)
    for (place, fmt, operation, own), group in groups.items():
        variants = [check.preset or check.activation for check in group]
        kind = "presets" if group[0].preset else "activations"
        names = own or (", ".join(variants) if len(variants) < 3 else f"{len(variants)} {kind}")
        numbers, wrong = sum(check.numbers for check in group), sum(check.wrong for check in group)
        yield [place, fmt, operation, names, str(numbers), str(wrong), group[0].first]


class Progress:
    """Says on stderr, now and then, how far a backend is."""

    def __init__(self, place: exact.Place) -> None:
        self.place = place
        self.said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            say(f"{self.place.backend} on {self.place.device}: {done} of {total} tests")


def _verify_checkpoint(
    path: str, source: str | None, presets: Sequence[str], backend: str, device: str, output: Output | None
) -> None:
    _refuse("a checkpoint", {"--backend all": backend == ALL})
    place = exact.places(backend, device)[0]
    found = verify_checkpoint(
        resolve_model(path),
        source=None if source is None else resolve_model(source),
        presets=presets,
        required=len(presets) == 1,
        backend=place.backend,
        device=place.device,
        progress=BytesProgress(),
    )
    records = [dataclasses.asdict(finding) for finding in found.findings]
    counts = Counter(finding.severity for finding in found.findings)
    said = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in Severity)
    show(
        Table(
            header=_FINDINGS,
            rows=[[str(value) for value in record.values()] for record in records],
            left=len(_FINDINGS),
            note=f"{found.path}: {found.tensors} tensors, {found.modules} quantised weights; {said}.",
        ),
        records=records,
        document=dataclasses.asdict(found) | {"path": str(found.path)},
        output=output,
    )
    if found.failed:
        raise typer.Exit(1)


def _refuse(what: str, given: Mapping[str, bool]) -> None:
    """Options that mean nothing here are refused, not passed over."""
    for option, is_given in given.items():
        if is_given:
            raise typer.BadParameter(f"is of no use for {what}", param_hint=option)
