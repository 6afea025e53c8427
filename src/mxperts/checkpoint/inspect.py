"""What a checkpoint holds: formats, bytes, and anything odd about its numbers."""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mxperts.checkpoint.names import split_expert, split_fused
from mxperts.checkpoint.reader import Checkpoint
from mxperts.formats import SCALE_BIAS, SCALE_NAN
from mxperts.tensor import MXTensor

EXPERTS, LINEARS, OTHER = "experts", "linears", "other"
KINDS = (EXPERTS, LINEARS, OTHER)
"""Experts' projections; other quantised weights and matrices; all else: embeddings, norms, biases."""

EXTREME_EXPONENT = 64
"""Scales below 2^-64 or above 2^64 are called extreme: no trained weight is near them."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EMBEDDING = re.compile(r".*embed[^.]*\.weight$|.*\.wte\.weight$")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights of one name, in all layers and experts that have them in the same scheme.

    Attributes:
        modules: their name, with ``*`` for numbers.
        layers: the layers, such as ``0-3, 5``; empty if there is none in the name.
        scheme: what they are quantised to; the dtype, in lower case, of unquantised ones.
        count: how many.
        nbytes: bytes, of codes and scales.
        values: how many values these stand for.
    """

    modules: str
    layers: str
    scheme: str
    count: int
    nbytes: int
    values: int


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """Something odd about a tensor's numbers.

    Attributes:
        tensor: its name, or that of the quantised module.
        what: what is odd.
        count: in how many values, or blocks.
    """

    tensor: str
    what: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint holds.

    Attributes:
        path: its folder.
        layout: as in ``ModelScheme``; None if nothing is quantised to MX.
        rotation: by what quantised weights are rotated.
        model_type: as config.json has it.
        tensors: how many tensors.
        files: how many safetensors files.
        groups: experts and linear layers.
        nbytes: bytes by kind; see ``KINDS``.
        values: values by kind; scales of blocks and of activations are none.
        anomalies: None if the data were not read.
    """

    path: Path
    layout: str | None
    rotation: str | None
    model_type: str | None
    tensors: int
    files: int
    groups: tuple[Group, ...]
    nbytes: Mapping[str, int]
    values: Mapping[str, int]
    anomalies: tuple[Anomaly, ...] | None

    def bits_per_value(self, kind: str | None = None) -> float:
        """Stored bits for each value of one kind, or of all."""
        kinds = KINDS if kind is None else (kind,)
        values = sum(self.values[k] for k in kinds)
        return 8 * sum(self.nbytes[k] for k in kinds) / values if values else 0.0


def inspect_checkpoint(path: str | Path, *, check: bool = False) -> Inspection:
    """Describe a checkpoint.

    Args:
        path: its folder.
        check: read all data too, and list anomalies.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint.open(path)
    packed = {t.name for module in checkpoint.mx.values() for t in (module.codes, module.scales)}
    weights = list(_weights(checkpoint, packed))
    nbytes, values = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for weight in weights:
        nbytes[weight.kind] += weight.nbytes
        values[weight.kind] += weight.values
    model_type = checkpoint.config.get("model_type")
    return Inspection(
        path=checkpoint.path,
        layout=checkpoint.scheme.layout if checkpoint.scheme else None,
        rotation=checkpoint.scheme.rotation if checkpoint.scheme else None,
        model_type=model_type if isinstance(model_type, str) else None,
        tensors=len(checkpoint.tensors),
        files=len(checkpoint.files),
        groups=tuple(_groups(weights)),
        nbytes=nbytes,
        values=values,
        anomalies=tuple(_anomalies(checkpoint, packed)) if check else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A quantised module, or another tensor."""

    name: str
    kind: str
    scheme: str
    nbytes: int
    values: int


def _weights(checkpoint: Checkpoint, packed: set[str]) -> Iterator[_Weight]:
    for module in checkpoint.mx.values():
        yield _Weight(
            name=module.name,
            kind=EXPERTS if split_expert(module.name) or split_fused(module.name) else LINEARS,
            scheme=module.scheme.name,
            nbytes=module.codes.nbytes + module.scales.nbytes,
            values=module.values,
        )
    input_scale = checkpoint.scheme.names.input_scale if checkpoint.scheme else None
    for name, info in checkpoint.tensors.items():
        if name not in packed:
            yield _Weight(
                name=name.removesuffix(".weight"),
                kind=kind_of(name, info.shape),
                scheme=info.dtype.lower(),
                nbytes=info.nbytes,
                values=0 if input_scale is not None and name.endswith(input_scale) else info.values,
            )


def _groups(weights: Iterable[_Weight]) -> Iterator[Group]:
    found: dict[tuple[str, str], list[_Weight]] = {}
    for weight in weights:
        if weight.kind != OTHER:
            found.setdefault((_NUMBER.sub("*", weight.name), weight.scheme), []).append(weight)
    for (modules, scheme), members in sorted(found.items()):
        numbers = {int(n[0]) for weight in members if (n := _NUMBER.search(weight.name)) is not None}
        yield Group(
            modules=modules,
            layers=_ranges(sorted(numbers)),
            scheme=scheme,
            count=len(members),
            nbytes=sum(weight.nbytes for weight in members),
            values=sum(weight.values for weight in members),
        )


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def kind_of(tensor: str, shape: tuple[int, ...]) -> str:
    """Which of ``KINDS`` an unquantised tensor is."""
    module = tensor.removesuffix(".weight")
    if (module != tensor and split_expert(module) is not None) or split_fused(tensor) is not None:
        return EXPERTS
    return LINEARS if module != tensor and len(shape) == 2 and not _EMBEDDING.match(tensor) else OTHER


class Oddity(enum.Enum):
    """What may be odd about the numbers of a quantised tensor."""

    NAN_BLOCK = "blocks with scale 0xFF, which are NaN"
    ZERO_BLOCK = "blocks of zeros"
    LEAST_SCALE = "scales 0x00 of blocks that are not zeros"
    EXTREME_SCALE = f"scales beyond 2^±{EXTREME_EXPONENT}"
    NAN_CODE = "codes that are NaN"
    INF_CODE = "codes that are Inf"
    NEGATIVE_ZERO = "codes that are -0"
    BEYOND_MAX = "codes below -max"


_USUAL = (Oddity.NEGATIVE_ZERO, Oddity.BEYOND_MAX)
"""What presets differ in, and inspection does not mention."""


def odd_numbers(part: MXTensor) -> Iterator[tuple[Oddity, Tensor]]:
    """Where a quantised matrix [N, K] is odd: bool [N, blocks] for blocks and scales, [N, K] for codes."""
    scales = part.scales.to(torch.int16)
    is_nan = scales == SCALE_NAN
    is_zero = (part.packed.unflatten(-1, (scales.shape[-1], -1)) == 0).all(-1)
    is_plain = ~is_nan & ~is_zero
    yield Oddity.NAN_BLOCK, is_nan
    yield Oddity.ZERO_BLOCK, is_zero & ~is_nan
    yield Oddity.LEAST_SCALE, is_plain & (scales == 0)
    yield Oddity.EXTREME_SCALE, is_plain & (scales != 0) & ((scales - SCALE_BIAS).abs() > EXTREME_EXPONENT)
    element, codes = part.format.element, part.codes()
    for oddity, numbers in (
        (Oddity.NAN_CODE, [c for c, v in enumerate(element.values) if math.isnan(v)]),
        (Oddity.INF_CODE, [c for c, v in enumerate(element.values) if math.isinf(v)]),
        (Oddity.NEGATIVE_ZERO, [element.sign_bit] if element.has_signed_zero else []),
        (Oddity.BEYOND_MAX, [c for c, v in enumerate(element.values) if math.isfinite(v) and v < -element.max]),
    ):
        if numbers:
            yield oddity, torch.isin(codes, codes.new_tensor(numbers))


def matrices(t: MXTensor) -> list[MXTensor]:
    """A tensor's matrices [N, K]: several where it holds all experts; looking at one at a time bounds memory."""
    return [t[i] for i in range(len(t))] if t.ndim > 2 else [t]


def _anomalies(checkpoint: Checkpoint, packed: set[str]) -> Iterator[Anomaly]:
    for module, tensor in checkpoint.mx_tensors():
        for what, count in _count_mx(tensor).items():
            yield Anomaly(tensor=module, what=what, count=count)
    for name in checkpoint.names:
        if name not in packed and (values := checkpoint.tensor(name)).is_floating_point():
            for what, count in count_float(values).items():
                yield Anomaly(tensor=name, what=what, count=count)


def _count_mx(t: MXTensor) -> Counter[str]:
    found: Counter[str] = Counter()
    for part in matrices(t):
        for oddity, where in odd_numbers(part):
            if oddity not in _USUAL:
                found[oddity.value] += int(where.sum())
    return +found


def count_float(t: Tensor) -> Counter[str]:
    """How many values of an unquantised tensor are NaN or Inf."""
    t = t.float() if t.dtype.itemsize == 1 else t  # isinf is not there for float8
    return +Counter({"values that are NaN": int(t.isnan().sum()), "values that are Inf": int(t.isinf().sum())})
