"""What a quantised checkpoint will hold, known to the byte before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.checkpoint import Checkpoint, Rule, quark
from mxperts.checkpoint.inspect import KINDS, OTHER, kind_of
from mxperts.checkpoint.safetensors_file import DTYPES, Entry, TensorInfo
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import FP8_STATIC, MXFP8_E4M3, MXFP8_E5M2, MXINT8, BlockFormat, Scheme
from mxperts.ops.quantize import FLOAT_DTYPES, quantize
from mxperts.quantization.leaves import WEIGHT, Leaf, leaves

_CODE_DTYPES = {MXFP8_E4M3: torch.float8_e4m3fn, MXFP8_E5M2: torch.float8_e5m2, MXINT8: torch.int8}
"""Dtype of stored codes, where it is not uint8."""
_CHUNK = 1 << 24
"""Values that are quantised at a time, which bounds memory."""
_NONE = Scheme("none")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How weights are quantised: see ``mxperts.quantize``.

    Attributes:
        preset: whose recipe.
        scale_rule: instead of the preset's.
        input_scales: of static fp8 activations, by module.
    """

    preset: str | None
    scale_rule: str | None
    input_scales: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step: a part of one source tensor and what becomes of it.

    Attributes:
        source: the tensor.
        nbytes: bytes of the part.
        kind: see ``mxperts.checkpoint.inspect.KINDS``.
        outputs: headers of what is written, all of one item size.
        leaf: the linear layer that is cut out; None for a tensor that is taken as it is.
        format: what it is quantised to, or None.
        value: written instead, if it does not come from the source.
    """

    source: TensorInfo
    nbytes: int
    kind: str
    outputs: tuple[Entry, ...]
    leaf: Leaf | None = None
    format: BlockFormat | None = None
    value: float | None = None

    def run(self, checkpoint: Checkpoint, numbers: Numbers) -> Iterator[Tensor]:
        """Make the tensors of ``outputs``, one after the other."""
        if self.value is not None:
            yield torch.tensor(self.value)
            return
        tensor = checkpoint.tensor(self.source.name)
        if self.leaf is not None:
            tensor = self.leaf.view(tensor)
        if self.format is None:
            yield tensor
        else:
            yield from _quantize(tensor, self.format, numbers)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps, and the config that describes the result.

    Attributes:
        shards: the jobs for every file, largest item size first, so that all tensors are aligned.
        rules: the schemes of the result: what is unquantised by name, layers, and the rest.
        modules: how many linear layers are quantised.
    """

    shards: Mapping[str, Sequence[Job]]
    rules: Sequence[Rule]
    modules: int

    def bytes_before(self) -> dict[str, int]:
        """Bytes of the source by kind."""
        return {kind: sum(job.nbytes for job in self._jobs(kind)) for kind in KINDS}

    def bytes_after(self) -> dict[str, int]:
        """Bytes of the result by kind."""
        return {kind: sum(entry.nbytes for job in self._jobs(kind) for entry in job.outputs) for kind in KINDS}

    def _jobs(self, kind: str) -> Iterator[Job]:
        return (job for jobs in self.shards.values() for job in jobs if job.kind == kind)


def make_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    *,
    exclude: Sequence[str],
    layer_schemes: Mapping[str, Scheme],
    numbers: Numbers,
) -> Plan:
    """Decide on every tensor of a checkpoint.

    Args:
        checkpoint: the source.
        scheme: of every linear layer but these:
        exclude: patterns of layers that stay as they are.
        layer_schemes: schemes by pattern, the first match counts.
        numbers: how weights are quantised.

    Raises:
        ArgumentError: a pattern in ``layer_schemes`` matches nothing, nothing is left to quantise, or input scales are
            missing.
        CheckpointError: a tensor cannot be quantised; the message says why.
    """
    found = leaves(checkpoint)
    excluded = [Rule(pattern=pattern, scheme=_NONE) for pattern in exclude]
    layers = [Rule(pattern=pattern, scheme=s) for pattern, s in layer_schemes.items()]
    rules = [*excluded, *layers, Rule(pattern="*", scheme=scheme)]
    modules = dict.fromkeys(leaf.module for group in found.values() for leaf in group)
    schemes = {module: next(rule.scheme for rule in rules if rule.matches(module)) for module in modules}
    for rule in layers:
        if not any(rule.matches(module) for module in modules):
            raise ArgumentError(f"the pattern {rule.pattern!r} of layer_schemes matches no layer of {checkpoint.path}")
    for found_scheme in schemes.values():
        if found_scheme.weight is None and found_scheme.activation is not None:
            raise ArgumentError(f"{found_scheme} quantises no weights; a checkpoint cannot hold activations alone")
    if all(s == _NONE for s in schemes.values()):
        raise ArgumentError(f"nothing in {checkpoint.path} is left to quantise: exclude less")
    _check_input_scales(schemes, numbers.input_scales)

    split = _split_experts(found, schemes)
    shards: dict[str, list[Job]] = {file.name: [] for file in checkpoint.files}
    kept: dict[str, None] = {}
    for name, group in found.items():
        info = checkpoint.info(name)
        jobs = shards[info.file.name]
        if not group or (_is_fused(name, group) and name.rpartition(".")[0] not in split):
            jobs.append(_copy(info))
            kept |= dict.fromkeys([name] if len(info.shape) == 3 and group else [])
        else:
            jobs += [job for leaf in group for job in _leaf_jobs(leaf, schemes[leaf.module], numbers)]
        kept |= dict.fromkeys(leaf.module for leaf in group if schemes[leaf.module] == _NONE)
    for jobs in shards.values():
        jobs.sort(key=lambda job: -job.outputs[0].dtype.itemsize)
    quantized = [rule for rule in rules[len(excluded) : -1] if rule.scheme != _NONE]
    return Plan(
        shards=shards,
        rules=[*(Rule(pattern=module, scheme=_NONE) for module in kept), *quantized, rules[-1]],
        modules=sum(s.weight is not None for s in schemes.values()),
    )


def _check_input_scales(schemes: Mapping[str, Scheme], scales: Mapping[str, float]) -> None:
    missing = [module for module, s in schemes.items() if s.activation == FP8_STATIC and module not in scales]
    if missing:
        raise ArgumentError(
            f"static fp8 activations need a scale for the input of each layer, measured on sample text, and "
            f"{missing[0]} has none ({len(missing)} are missing): give input_scales, or take fp8_dynamic, which needs "
            "none"
        )


def _split_experts(found: Mapping[str, Sequence[Leaf]], schemes: Mapping[str, Scheme]) -> set[str]:
    """Experts modules whose tensors hold several layers each and must be split, since one of these is quantised."""
    return {
        name.rpartition(".")[0]
        for name, group in found.items()
        if _is_fused(name, group) and any(schemes[leaf.module] != _NONE for leaf in group)
    }


def _is_fused(name: str, group: Sequence[Leaf]) -> bool:
    return any(leaf.module + leaf.part != name for leaf in group)


def _copy(info: TensorInfo) -> Job:
    entry = Entry(name=info.name, dtype=DTYPES[info.dtype], shape=info.shape)
    return Job(source=info, nbytes=info.nbytes, kind=kind_of(info.name, info.shape), outputs=(entry,))


def _leaf_jobs(leaf: Leaf, scheme: Scheme, numbers: Numbers) -> Iterator[Job]:
    info, fmt = leaf.source, scheme.weight if leaf.part == WEIGHT else None
    entry = Entry(name=leaf.module + leaf.part, dtype=DTYPES[info.dtype], shape=leaf.shape)
    yield Job(
        source=info,
        nbytes=entry.nbytes,
        kind=kind_of(info.name, info.shape),
        outputs=(entry,) if fmt is None else _packed_entries(leaf, fmt),
        leaf=leaf,
        format=fmt,
    )
    if leaf.part == WEIGHT and scheme.activation == FP8_STATIC:
        entry = Entry(name=f"{leaf.module}{quark.NAMES.input_scale}", dtype=torch.float32, shape=())
        value = float(numbers.input_scales[leaf.module])
        yield Job(source=info, nbytes=0, kind=OTHER, outputs=(entry,), value=value)


def _packed_entries(leaf: Leaf, fmt: BlockFormat) -> tuple[Entry, Entry]:
    """Headers of codes and scales as Quark stores them: without the padding of a last block."""
    info = leaf.source
    if DTYPES[info.dtype] not in FLOAT_DTYPES:
        raise CheckpointError(f"{info.file}: {info.name} is {info}; BF16, F16 and F32 can be quantised; exclude it")
    rows, k = leaf.shape
    if k * fmt.element.bits % 8 or not k:
        raise CheckpointError(
            f"{info.file}: a row of {k} values of {info.name} does not fill whole bytes in {fmt}; exclude {leaf.module}"
        )
    codes = Entry(
        name=leaf.module + quark.NAMES.codes_suffix(fmt),
        dtype=_CODE_DTYPES.get(fmt, torch.uint8),
        shape=(rows, fmt.stored_size(k)),
    )
    return codes, Entry(name=leaf.module + quark.NAMES.scales, dtype=torch.uint8, shape=(rows, fmt.blocks(k)))


def _quantize(weight: Tensor, fmt: BlockFormat, numbers: Numbers) -> Iterator[Tensor]:
    """Codes and scales of a weight [N, K]."""
    rows, k = weight.shape
    codes = torch.empty((rows, fmt.stored_size(k)), dtype=torch.uint8)
    scales = torch.empty((rows, fmt.blocks(k)), dtype=torch.uint8)
    step = max(1, _CHUNK // k)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        t = quantize(weight[part], fmt, preset=numbers.preset, scale_rule=numbers.scale_rule)
        codes[part], scales[part] = t.packed[:, : codes.shape[1]], t.scales
    yield codes.view(_CODE_DTYPES.get(fmt, torch.uint8))
    yield scales
