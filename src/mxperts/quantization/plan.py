"""What a quantised checkpoint will hold, known to the byte before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mxperts.checkpoint import Checkpoint, Rule, TensorNames
from mxperts.checkpoint.config import layout_of, text_config
from mxperts.checkpoint.inspect import OTHER, kind_of
from mxperts.checkpoint.pieces import Piece, Role, job, stack_experts
from mxperts.checkpoint.rewrite import Job
from mxperts.checkpoint.rules import check_expressible
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import FP8_STATIC, BlockFormat, Scheme
from mxperts.ops.quantize import FLOAT_DTYPES, quantize
from mxperts.quantization.choice import Methods
from mxperts.quantization.leaves import BIAS, WEIGHT, Leaf, leaves
from mxperts.quantization.methods.problem import Problem
from mxperts.rotation import check_rotation, rotate_weight

_CHUNK = 1 << 24
"""Values that are quantised at a time, which bounds memory."""
_NONE = Scheme("none")
_ROLES = {WEIGHT: Role.WEIGHT, BIAS: Role.BIAS}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How weights are quantised: see ``mxperts.quantize``.

    Attributes:
        preset: whose recipe.
        scale_rule: instead of the preset's.
        input_scales: of static fp8 activations, by module.
        rotation: by what weights are rotated before.
    """

    preset: str | None
    scale_rule: str | None
    input_scales: Mapping[str, float]
    rotation: str | None = None

    def rotated(self, weight: Tensor) -> Tensor:
        """A weight [..., K] as it is to be quantised."""
        return weight if self.rotation is None else rotate_weight(weight)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the numbers of the result come from.

    Attributes:
        file: the file that a tensor of the checkpoint goes to.
        tensor: a tensor of the checkpoint by name.
        leaf: a weight or bias.
        quantize: codes and scales of a weight [N, K], without the padding of a last block.
    """

    file: Callable[[TensorInfo], str]
    tensor: Callable[[str], Tensor]
    leaf: Callable[[Leaf], Tensor]
    quantize: Callable[[Leaf, BlockFormat], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, numbers: Numbers, methods: Methods | None = None) -> Source:
        """The checkpoint's own numbers file by file, rounded to nearest or by methods that have no inputs to go by."""

        def leaf(leaf: Leaf) -> Tensor:
            return leaf.view(checkpoint.tensor(leaf.source.name))

        def quantize(part: Leaf, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
            if methods is None or methods.rounds(part.module):
                return round_to_nearest(leaf(part), fmt, numbers)
            weight = numbers.rotated(leaf(part))
            problem = Problem(weight=weight, format=fmt, preset=numbers.preset, scale_rule=numbers.scale_rule)
            t = methods.of(part.module)(problem)
            return t.packed[..., : fmt.stored_size(t.k)], t.scales

        return cls(file=lambda info: info.file.name, tensor=checkpoint.tensor, leaf=leaf, quantize=quantize)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All steps, and what they make.

    Attributes:
        shards: the steps for every file.
        schemes: of every linear layer, router and embedding, and of experts that stay in one tensor.
        modules: how many linear layers are quantised.
    """

    shards: Mapping[str, Sequence[Job]]
    schemes: Mapping[str, Scheme]
    modules: int


def make_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    *,
    exclude: Sequence[str],
    layer_schemes: Mapping[str, Scheme],
    numbers: Numbers,
    format: str,
    source: Source | None = None,
    chosen: Mapping[str, Scheme] | None = None,
) -> Plan:
    """Decide on every tensor of a checkpoint.

    Args:
        checkpoint: the source.
        scheme: of every linear layer but these:
        exclude: patterns of layers that stay as they are.
        layer_schemes: schemes by pattern, the first match counts.
        numbers: how weights are quantised.
        format: the layout to be written.
        source: where numbers come from and files are cut; default: the checkpoint's own, rounded to nearest.
        chosen: schemes of single layers by name, which count before all else.

    Raises:
        ArgumentError: a pattern in ``layer_schemes`` matches nothing, nothing is left to quantise, input scales are
            missing, the layout cannot hold one of the layers, or one cannot be rotated.
        CheckpointError: a tensor cannot be quantised; the message says why.
    """
    names = layout_of(format).NAMES
    found = leaves(checkpoint, names)
    source = source or Source.of(checkpoint, numbers)
    excluded = [Rule(pattern=pattern, scheme=_NONE) for pattern in exclude]
    layers = [Rule(pattern=pattern, scheme=s) for pattern, s in layer_schemes.items()]
    rules = [*excluded, *layers, Rule(pattern="*", scheme=scheme)]
    modules = dict.fromkeys(leaf.module for group in found.values() for leaf in group)
    schemes = {module: next(rule.scheme for rule in rules if rule.matches(module)) for module in modules}
    schemes |= chosen or {}
    for rule in layers:
        if not any(rule.matches(module) for module in modules):
            raise ArgumentError(f"the pattern {rule.pattern!r} of layer_schemes matches no layer of {checkpoint.path}")
    for found_scheme in schemes.values():
        if found_scheme.weight is None and found_scheme.activation is not None:
            raise ArgumentError(f"{found_scheme} quantises no weights; a checkpoint cannot hold activations alone")
    if all(s == _NONE for s in schemes.values()):
        raise ArgumentError(f"nothing in {checkpoint.path} is left to quantise: exclude less")
    wanted = [Rule(pattern=module, scheme=s) for module, s in schemes.items()]
    check_expressible(format, wanted, text_config(checkpoint.config).get("model_type"))
    _check_input_scales(schemes, numbers.input_scales)

    split = _split_experts(found, schemes)
    shards: dict[str, list[Piece]] = {source.file(checkpoint.info(name)): [] for name in found}
    kept: dict[str, Scheme] = {}
    for name, group in found.items():
        info = checkpoint.info(name)
        pieces = shards[source.file(info)]
        if not group or (_is_fused(name, group) and name.rpartition(".")[0] not in split):
            pieces.append(_copy(source, info))
            kept |= dict.fromkeys([name] if len(info.shape) == 3 and group else [], _NONE)
        else:
            for leaf in group:
                pieces += _leaf_pieces(source, leaf, schemes[leaf.module], names, numbers)
    return Plan(
        shards={file: _jobs(pieces, names) for file, pieces in shards.items()},
        schemes=schemes | kept,
        modules=sum(s.weight is not None for s in schemes.values()),
    )


def _jobs(pieces: Sequence[Piece], names: TensorNames) -> list[Job]:
    return [job(piece, names) for piece in (stack_experts(pieces) if names.stacked else pieces)]


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


def _copy(source: Source, info: TensorInfo) -> Piece:
    return Piece(
        module=info.name,
        dtypes=(DTYPES[info.dtype],),
        shapes=(info.shape,),
        make=lambda: [source.tensor(info.name)],
        nbytes=info.nbytes,
        kind=kind_of(info.name, info.shape),
    )


def _leaf_pieces(source: Source, leaf: Leaf, scheme: Scheme, names: TensorNames, numbers: Numbers) -> Iterator[Piece]:
    info, fmt = leaf.source, scheme.weight if leaf.part == WEIGHT else None
    dtype = DTYPES[info.dtype]

    yield Piece(
        module=leaf.module,
        role=_ROLES[leaf.part],
        scheme=_NONE if fmt is None else scheme,
        dtypes=(dtype,) if fmt is None else (torch.uint8, torch.uint8),
        shapes=(leaf.shape,) if fmt is None else packed_shapes(leaf, fmt, numbers.rotation),
        make=(lambda: [source.leaf(leaf)]) if fmt is None else lambda: source.quantize(leaf, fmt),
        nbytes=dtype.itemsize * torch.Size(leaf.shape).numel(),
        kind=kind_of(info.name, info.shape),
    )
    if leaf.part == WEIGHT and scheme.activation == FP8_STATIC:
        value = float(numbers.input_scales[leaf.module])
        yield Piece(
            module=leaf.module,
            role=Role.INPUT_SCALE,
            dtypes=(torch.float32,),
            shapes=(names.input_scale_shape,),
            make=partial(_number, value),
            nbytes=0,
            kind=OTHER,
        )


def _number(value: float) -> list[Tensor]:
    return [torch.tensor(value)]


def packed_shapes(leaf: Leaf, fmt: BlockFormat, rotation: str | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of codes and scales as they are stored: without the padding of a last block."""
    info = leaf.source
    if DTYPES[info.dtype] not in FLOAT_DTYPES:
        raise CheckpointError(f"{info.file}: {info.name} is {info}; BF16, F16 and F32 can be quantised; exclude it")
    rows, k = leaf.shape
    if k * fmt.element.bits % 8 or not k:
        raise CheckpointError(
            f"{info.file}: a row of {k} values of {info.name} does not fill whole bytes in {fmt}; exclude {leaf.module}"
        )
    check_rotation(rotation, **{leaf.module: k})
    return (rows, fmt.stored_size(k)), (rows, fmt.blocks(k))


def round_to_nearest(weight: Tensor, fmt: BlockFormat, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [N, K], as they are stored: without the padding of a last block."""
    rows, k = weight.shape
    codes = torch.empty((rows, fmt.stored_size(k)), dtype=torch.uint8)
    scales = torch.empty((rows, fmt.blocks(k)), dtype=torch.uint8)
    step = max(1, _CHUNK // k)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        t = quantize(numbers.rotated(weight[part]), fmt, preset=numbers.preset, scale_rule=numbers.scale_rule)
        codes[part], scales[part] = t.packed[:, : codes.shape[1]], t.scales
    return codes, scales
