"""convert_checkpoint: from one layout to another; codes, scales and all other numbers keep their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from mxperts.checkpoint import compressed_tensors, gpt_oss, quark
from mxperts.checkpoint.config import LAYOUTS, layout_of, text_config
from mxperts.checkpoint.inspect import EXPERTS, LINEARS, OTHER, kind_of
from mxperts.checkpoint.layout import Rule, TensorNames
from mxperts.checkpoint.names import ALTERNATING, respell, split_expert, split_fused
from mxperts.checkpoint.pieces import Piece, Role, job, regroup
from mxperts.checkpoint.reader import Checkpoint
from mxperts.checkpoint.rewrite import Job, rewrite, sizes
from mxperts.checkpoint.rules import check_expressible, rules_of
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo
from mxperts.checkpoint.stored import MXModule
from mxperts.checkpoint.writer import check_absent
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import FP8_STATIC, Scheme

MAX_SHARD_SIZE = "5GB"
"""Largest file that is written, unless one step alone is larger; the Hugging Face hub's own choice."""

_NONE = Scheme("none")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """How a layout is written so that its own software opens it.

    Attributes:
        names: of its tensors.
        write: its ``quantization_config`` for some rules.
    """

    names: TensorNames
    write: Callable[[Sequence[Rule]], dict[str, Any]]


_TARGETS = {
    quark.NAME: _Target(names=quark.NAMES_PER_BLOCK, write=partial(quark.write, per_block=True)),
    compressed_tensors.NAME: _Target(names=compressed_tensors.NAMES, write=compressed_tensors.write),
    gpt_oss.NAME: _Target(names=gpt_oss.NAMES, write=gpt_oss.write),
}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did, or would do.

    Attributes:
        dst: the folder written; None after a dry run.
        source, format: the layouts.
        schemes: how many quantised weights of each scheme the result has.
        files: how many safetensors files it has.
        bytes_before: of tensors in the source, by kind: experts, linears, other.
        bytes_after: of tensors in the result, by kind.
        resumed: files that an earlier, interrupted run had finished.
    """

    dst: Path | None
    source: str
    format: str
    schemes: Mapping[str, int]
    files: int
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    resumed: int


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Callable[[int, int], None] | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Write an MX checkpoint in another layout, so that the software of that layout opens it.

    Tensors get other names, and experts are stacked, or cut up and gate and up brought together, where the layout wants
    that; every number keeps its bytes. config.json keeps all but its ``quantization_config``; tokenizer and other small
    files are copied. ``<dst>.partial`` holds the work until all is there; an interrupted run goes on from it.

    Args:
        src: folder of an MX checkpoint.
        dst: folder to write; must not exist.
        format: "quark", "compressed-tensors" or "gpt-oss".
        max_shard_size: largest file to write, in bytes or such as "5GB".
        progress: called with bytes of the source done and in total.
        dry_run: only plan, and write nothing.

    Returns:
        What was done, or would be.

    Raises:
        CheckpointError: ``src`` is damaged, holds no MX formats or rotated weights, or is in this layout already;
            ``dst`` exists, ``<dst>.partial`` was begun with other settings, or the disk is too small.
        ArgumentError: no such layout, or it cannot hold a module of ``src``; the message names it and says why.
    """
    if layout_of(format).NAME not in _TARGETS:
        raise ArgumentError(f"nothing is converted to the layout {format!r}; `mxperts quantize --rotate` writes it")
    target = _TARGETS[format]
    dst = Path(dst)
    check_absent(dst)
    checkpoint = Checkpoint.open(src)
    source = _check_source(checkpoint, format)
    model_type = text_config(checkpoint.config).get("model_type")
    check_expressible(format, _rules(checkpoint), model_type)

    pieces = list(_pieces(checkpoint))
    if model_type in ALTERNATING:
        pieces = regroup(pieces, target.names)
    pieces = [replace(p, module=respell(p.module, model_type, format)) for p in pieces]
    weights = {piece.module: piece.scheme for piece in pieces if _has_scheme(piece)}
    left_alone = {respell(name, model_type, format): _NONE for name in _left_alone(checkpoint)}
    config = _replace_config(checkpoint.config, target.write(rules_of(left_alone | weights)))
    shards = _shards([job(piece, target.names) for piece in pieces], max_shard_size)
    before, after = sizes(shards)
    settings = {"format": format, "shards": {shard: len(jobs) for shard, jobs in shards.items()}}
    resumed = 0 if dry_run else rewrite(checkpoint, dst, config, shards, settings, progress)
    schemes = [str(scheme) for scheme in weights.values() if scheme != _NONE]
    return Conversion(
        dst=None if dry_run else dst,
        source=source,
        format=format,
        schemes={scheme: schemes.count(scheme) for scheme in dict.fromkeys(schemes)},
        files=len(shards),
        bytes_before=before,
        bytes_after=after,
        resumed=resumed,
    )


def _check_source(checkpoint: Checkpoint, format: str) -> str:
    """The source's layout."""
    if checkpoint.scheme is None:
        raise CheckpointError(
            f"{checkpoint.path} has no weights in MX formats, in none of the layouts {', '.join(LAYOUTS)}; "
            f"`mxperts quantize --format {format}` makes such a checkpoint of an unquantised one"
        )
    if checkpoint.scheme.rotation is not None:
        raise CheckpointError(
            f"{checkpoint.path} has weights rotated by {checkpoint.scheme.rotation!r}, whose inputs must be rotated "
            f"too; the {format} layout has no words for that, and other software would run it wrong. Quantise the "
            f"checkpoint that it came from: `mxperts quantize --format {format}`"
        )
    if checkpoint.scheme.layout == format:
        raise CheckpointError(f"{checkpoint.path} is in the {format} layout already; there is nothing to convert")
    return checkpoint.scheme.layout


def _rules(checkpoint: Checkpoint) -> Iterator[Rule]:
    """What every module that has a weight has, by its name in the source."""
    for name, module in checkpoint.mx.items():
        yield Rule(pattern=name, scheme=module.scheme, block_rows=module.block_rows)
    for piece in _pieces(checkpoint):
        if _has_scheme(piece) and piece.scheme == _NONE:
            yield Rule(pattern=piece.module, scheme=_NONE)


def _left_alone(checkpoint: Checkpoint) -> Iterator[str]:
    """Modules that the config leaves unquantised by name and that may have no tensor, such as tied ones."""
    assert checkpoint.scheme is not None
    for rule in checkpoint.scheme.rules:
        if rule.is_name and rule.scheme == _NONE and "experts" not in rule.pattern.split("."):
            yield rule.pattern


def _has_scheme(piece: Piece) -> bool:
    """Whether a config must say of it that it is quantised, or that it is not."""
    fused = split_fused(piece.module) is not None and len(piece.shapes[0]) == 3
    return piece.role is Role.WEIGHT or (piece.role is Role.OTHER and fused)


def _pieces(checkpoint: Checkpoint) -> Iterator[Piece]:
    """All of a checkpoint, in the order of its data."""
    assert checkpoint.scheme is not None
    names = checkpoint.scheme.names
    by_codes = {module.codes.name: module for module in checkpoint.mx.values()}
    scales = {module.scales.name for module in checkpoint.mx.values()}
    for name, info in checkpoint.tensors.items():
        if (module := by_codes.get(name)) is not None:
            yield _quantised(checkpoint, module)
        elif name not in scales:
            yield _plain(checkpoint, info, *_role(checkpoint, info, names))


def _role(checkpoint: Checkpoint, info: TensorInfo, names: TensorNames) -> tuple[str, Role]:
    """Which module a tensor belongs to that is neither codes nor scales, and as what."""
    module = info.name.removesuffix(".weight")
    if module != info.name and len(info.shape) == 2:
        return module, Role.WEIGHT
    module = info.name.removesuffix(names.bias)
    if module != info.name and (module in checkpoint.mx or split_expert(module) is not None):
        return module, Role.BIAS
    module = info.name.removesuffix(names.input_scale or "")
    if module in checkpoint.mx and checkpoint.mx[module].scheme.activation == FP8_STATIC:
        return module, Role.INPUT_SCALE
    return info.name, Role.OTHER


def _quantised(checkpoint: Checkpoint, module: MXModule) -> Piece:
    def make() -> Sequence[Tensor]:
        codes = checkpoint.tensor(module.codes.name)
        return codes.flatten(-2) if module.blocked else codes, checkpoint.tensor(module.scales.name)

    shape = module.codes.shape
    return Piece(
        module=module.name,
        role=Role.WEIGHT,
        scheme=module.scheme,
        dtypes=(DTYPES[module.codes.dtype], DTYPES[module.scales.dtype]),
        shapes=((*shape[:-2], shape[-2] * shape[-1]) if module.blocked else shape, module.scales.shape),
        make=make,
        nbytes=module.codes.nbytes + module.scales.nbytes,
        kind=EXPERTS if split_expert(module.name) or split_fused(module.name) else LINEARS,
    )


def _plain(checkpoint: Checkpoint, info: TensorInfo, module: str, role: Role) -> Piece:
    return Piece(
        module=module,
        role=role,
        dtypes=(DTYPES[info.dtype],),
        shapes=(info.shape,),
        make=lambda: [checkpoint.tensor(info.name)],
        nbytes=info.nbytes,
        kind=OTHER if role is Role.INPUT_SCALE else kind_of(info.name, info.shape),
    )


def _replace_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with another ``quantization_config`` in the place of its own."""
    if config.get("quantization_config") is None:
        return dict(config) | {"text_config": dict(config["text_config"]) | {"quantization_config": quantization}}
    return dict(config) | {"quantization_config": quantization}


def _shards(jobs: Iterable[Job], max_shard_size: int | str) -> dict[str, list[Job]]:
    """The steps by file, in order."""
    numbered = {str(number): step for number, step in enumerate(jobs)}
    try:
        split = split_state_dict_into_shards_factory(
            numbered,
            get_storage_size=lambda step: step.size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ArgumentError(f"max_shard_size {max_shard_size!r}: {error}; expected bytes, or such as '5GB'") from None
    return {file: [numbered[number] for number in names] for file, names in split.filename_to_tensors.items()}
