"""Whether a checkpoint is in order: its files, its tensors against its config, and its numbers."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.inspect import Oddity, count_float, matrices, odd_numbers
from mxperts.checkpoint.names import split_expert, split_fused
from mxperts.checkpoint.reader import INDEX
from mxperts.checkpoint.safetensors_file import read_header
from mxperts.checkpoint.stored import expert_counts
from mxperts.errors import CheckpointError
from mxperts.formats import PRESETS, BlockFormat, Role, SignedZero
from mxperts.verification.source import Match, compare_source

Progress = Callable[[int, int], None]


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The checkpoint does not load, or a model that it makes computes nonsense."""
    WARNING = "warning"
    """It loads, but is hardly what was meant."""
    NOTE = "note"
    """Good to know."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing about a checkpoint.

    Attributes:
        severity: how bad it is.
        tensor: the tensor or module, with ``*`` for numbers where several have it; "" for the checkpoint.
        expected: what should be there.
        found: what is there.
    """

    severity: Severity
    tensor: str
    expected: str
    found: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found in a checkpoint.

    Attributes:
        path: its folder.
        tensors: how many tensors were looked at.
        modules: how many of them are quantised weights.
        findings: the worst first.
        matches: by preset and format, how the weights compare with what the preset gives from the source; empty
            without a source.
    """

    path: Path
    tensors: int
    modules: int
    findings: Sequence[Finding]
    matches: Sequence[Match] = ()

    @property
    def failed(self) -> bool:
        """Whether there is an error."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def verify_checkpoint(
    path: str | Path,
    *,
    source: str | Path | None = None,
    presets: Sequence[str] = tuple(PRESETS),
    required: bool = False,
    backend: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint's files, tensors and numbers, a part of one tensor in memory at a time.

    Args:
        path: its folder.
        source: the folder of the unquantised checkpoint that it was made from.
        presets: with whose codes and scales to compare.
        required: whether a weight that is not what these presets give is an error.
        backend, device: what quantises the source.
        progress: called with bytes read and in total.

    Raises:
        CheckpointError: the source is damaged or quantised.
        BackendUnavailable: the backend cannot run here.
    """
    findings: list[Finding] = []

    def complain(tensor: str, what: str) -> None:
        found, _, expected = what.partition("; expected ")
        findings.append(Finding(severity=Severity.ERROR, tensor=tensor, expected=expected, found=found))

    try:
        checkpoint = Checkpoint.open(path, complain=complain)
    except CheckpointError as error:
        complain("", str(error))
        return Verification(path=Path(path), tensors=0, modules=0, findings=findings)
    findings += _files(checkpoint)
    findings += _experts(checkpoint)
    if any(finding.severity is Severity.ERROR for finding in findings):
        what = "not compared with the model: what is wrong above would stop it from loading"
        findings.append(Finding(severity=Severity.NOTE, tensor="", expected="", found=what))
    else:
        findings += _model(checkpoint.path)
    sizes = [checkpoint.info(name).nbytes for name in checkpoint.names]
    compared = sum(m.codes.nbytes + m.scales.nbytes for m in checkpoint.mx.values()) if source is not None else 0
    report = progress or (lambda done, total: None)

    def step(done: int) -> None:
        report(done, sum(sizes) + compared)

    findings += _numbers(checkpoint, step)
    matches: Sequence[Match] = ()
    if source is not None:
        matches, missing = compare_source(
            checkpoint,
            Checkpoint.open(source),
            presets,
            backend=backend,
            device=device,
            progress=lambda done: step(sum(sizes) + done),
        )
        findings += _of_source(matches, missing, required=required)
    return Verification(
        path=checkpoint.path,
        tensors=len(checkpoint.tensors),
        modules=len(checkpoint.mx),
        findings=sorted(findings, key=lambda finding: list(Severity).index(finding.severity)),
        matches=matches,
    )


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors and files that nothing names, and an index that counts other bytes."""
    for file in checkpoint.files:
        for name, info in read_header(file).items():
            if checkpoint.tensors.get(name) != info:
                expected = f"every tensor of {file.name} in {INDEX}"
                found = f"{info} in {file.name} that it does not name, and nothing reads"
                yield Finding(severity=Severity.WARNING, tensor=name, expected=expected, found=found)
    for other in sorted(set(checkpoint.path.glob("*.safetensors")) - set(checkpoint.files)):
        found = f"{other.name}, which is no part of the checkpoint and is not read"
        yield Finding(severity=Severity.NOTE, tensor="", expected="", found=found)
    index = checkpoint.path / INDEX
    metadata = json.loads(index.read_bytes()).get("metadata") if index.exists() else None
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if total is not None and total != stored:
        expected = f"total_size {stored} in {INDEX}, the bytes of all tensors"
        yield Finding(severity=Severity.NOTE, tensor="", expected=expected, found=repr(total))


def _experts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Experts beyond those that the config counts."""
    count = next(iter(expert_counts(checkpoint.config)), None)
    if count is None:
        return
    expected = f"{count} experts, as config.json says"
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if (expert := split_expert(module)) is not None and expert[1] >= count:
            yield Finding(severity=Severity.ERROR, tensor=name, expected=expected, found=f"expert {expert[1]}")
        fused = split_fused(re.sub(r"_(blocks|scales|bias)$", "", name))
        if fused is not None and info.shape[:1] != (count,):
            yield Finding(severity=Severity.ERROR, tensor=name, expected=expected, found=str(info))


def _model(path: Path) -> Iterator[Finding]:
    """What Transformers' model of this config, without memory for its parameters, says of names and shapes."""
    import transformers

    from mxperts.integrations.transformers import load

    messages = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        _, info = cast(Any, load(path, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True))
    except CheckpointError as error:
        yield Finding(severity=Severity.ERROR, tensor="", expected="the model's parameters", found=str(error))
    except (ValueError, KeyError, ImportError, AttributeError, OSError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        found = f"names and shapes are not compared with a model, which Transformers cannot make: {first}"
        yield Finding(severity=Severity.WARNING, tensor="", expected="", found=found)
    else:
        for name in sorted(info["unexpected_keys"]):
            expected = "only tensors that the model has a parameter for"
            yield Finding(severity=Severity.WARNING, tensor=name, expected=expected, found="one that is left over")


_SEVERITIES = {
    Oddity.NAN_BLOCK: Severity.ERROR,
    Oddity.NAN_CODE: Severity.ERROR,
    Oddity.INF_CODE: Severity.ERROR,
    Oddity.EXTREME_SCALE: Severity.WARNING,
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(kw_only=True)
class _Group:
    """The same oddity of tensors that differ in numbers only."""

    first: str
    count: int = 0
    tensors: int = 0

    def add(self, count: int) -> None:
        self.count += count
        self.tensors += 1


def _numbers(checkpoint: Checkpoint, step: Callable[[int], None]) -> Iterator[Finding]:
    """What is odd about codes, scales and other numbers; what several layers or experts have is one finding."""
    odd: dict[tuple[str, BlockFormat, Oddity], _Group] = {}
    done, packed, file = 0, set(), None
    for module in checkpoint.mx.values():
        file = _next_file(checkpoint, file, module.codes.file)
        for index, part in enumerate(matrices(checkpoint.mx_tensor(module.name))):
            for oddity, where in odd_numbers(part):
                if count := int(where.sum()):
                    name = f"{module.name}[{index}]" if len(module.shape) > 2 else module.name
                    row, column = torch.nonzero(where)[0].tolist()
                    unit = "value" if where.shape == part.shape else "block"
                    key = _NUMBER.sub("*", module.name), module.format, oddity
                    odd.setdefault(key, _Group(first=f"{name}, row {row}, {unit} {column}")).add(count)
        packed |= {module.codes.name, module.scales.name}
        done += module.codes.nbytes + module.scales.nbytes
        step(done)
    for (pattern, fmt, oddity), group in odd.items():
        severity = _SEVERITIES.get(oddity, Severity.NOTE)
        found = f"{group.count} {oddity.value} in {group.tensors} tensors; the first: {group.first}"
        yield Finding(severity=severity, tensor=pattern, expected=_expectation(oddity, fmt), found=found)
    input_scale = checkpoint.scheme.names.input_scale if checkpoint.scheme else None
    for name, info in checkpoint.tensors.items():
        if name in packed:
            continue
        file = _next_file(checkpoint, file, info.file)
        values = checkpoint.tensor(name)
        if values.is_floating_point():
            for what, count in count_float(values).items():
                yield Finding(severity=Severity.ERROR, tensor=name, expected="numbers", found=f"{count} {what}")
            if input_scale is not None and name.endswith(input_scale) and not bool((values.float() > 0).all()):
                yield Finding(
                    severity=Severity.ERROR, tensor=name, expected="a scale above 0", found=str(values.tolist())
                )
        done += info.nbytes
        step(done)


def _next_file(checkpoint: Checkpoint, before: Path | None, file: Path) -> Path:
    """Let go of the files before, or the mapped pages of all would count as this process's memory."""
    if before != file:
        checkpoint.close()
    return file


def _expectation(oddity: Oddity, fmt: BlockFormat) -> str:
    """What should be there instead, or who would not have written it."""
    if oddity is Oddity.NEGATIVE_ZERO:
        dropping = [p.name for p in PRESETS.values() if p.recipe(fmt, Role.WEIGHT).signed_zero is SignedZero.DROP]
        return f"none from the presets {', '.join(dropping)}" if dropping else ""
    if oddity is Oddity.BEYOND_MAX:
        return "none from any preset"
    return "numbers" if _SEVERITIES.get(oddity) is Severity.ERROR else ""


def _of_source(matches: Sequence[Match], missing: Sequence[tuple[str, str]], *, required: bool) -> Iterator[Finding]:
    """How the weights compare with what presets give from the source."""
    for tensor, why in missing:
        severity = Severity.ERROR if required else Severity.WARNING
        yield Finding(severity=severity, tensor=tensor, expected="a weight to compare with", found=why)
    for match in sorted(matches, key=lambda match: (match.format, match.differing)):
        expected = f"what preset {match.preset} gives in {match.format}"
        if match.differing == 0:
            found = f"exactly that: {match.blocks} blocks of {match.tensors} tensors"
            yield Finding(severity=Severity.NOTE, tensor="", expected=expected, found=found)
        else:
            share = 100 * match.differing / match.blocks
            found = (
                f"{match.differing} of {match.blocks} blocks ({share:.3g} %), in {match.differing_tensors} of "
                f"{match.tensors} tensors, are others; the first: {match.first}"
            )
            severity = Severity.ERROR if required else Severity.NOTE
            yield Finding(severity=severity, tensor="", expected=expected, found=found)
