"""Whether a checkpoint's codes and scales are what presets give from the weights that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mxperts.checkpoint import Checkpoint
from mxperts.checkpoint.inspect import matrices
from mxperts.checkpoint.names import spellings, split_expert, split_fused
from mxperts.checkpoint.quark import NAMES
from mxperts.checkpoint.stored import MXModule
from mxperts.errors import CheckpointError
from mxperts.formats import PRESETS, Recipe, Role
from mxperts.ops.quantize import FLOAT_DTYPES, quantize
from mxperts.quantization.leaves import WEIGHT, Leaf, leaves
from mxperts.rotation import rotate_weight
from mxperts.tensor import MXTensor

_CHUNK = 1 << 22
"""Values that are compared at a time, which bounds memory."""


@dataclass(kw_only=True)
class Match:
    """How quantised weights in one format compare with what one preset gives.

    Attributes:
        preset, format: which.
        tensors, differing_tensors: matrices compared, and how many of them differ anywhere.
        blocks, differing: blocks compared, and how many differ in their scale or in any code.
        first: the first of these: where, and its scale and packed codes as the preset gives them and as stored.
    """

    preset: str
    format: str
    tensors: int = 0
    differing_tensors: int = 0
    blocks: int = 0
    differing: int = 0
    first: str = ""


def compare_source(
    checkpoint: Checkpoint,
    source: Checkpoint,
    presets: Sequence[str],
    *,
    backend: str,
    device: str,
    progress: Callable[[int], None],
) -> tuple[list[Match], list[tuple[str, str]]]:
    """Quantise the source again, as each preset does, and compare.

    Args:
        checkpoint, source: both opened.
        presets: names.
        backend, device: what quantises.
        progress: called with bytes of codes and scales compared.

    Returns:
        A match for each preset and format, and the modules that could not be compared, with the reason.

    Raises:
        CheckpointError: the source is quantised itself, or the checkpoint is not.
    """
    if source.mx:
        raise CheckpointError(f"{source.path} is quantised itself; name the unquantised checkpoint as the source")
    if not checkpoint.mx:
        raise CheckpointError(f"{checkpoint.path} has no quantised weights to compare with a source")
    weights = {leaf.module: leaf for group in leaves(source, NAMES).values() for leaf in group if leaf.part == WEIGHT}
    rotation = checkpoint.scheme.rotation if checkpoint.scheme else None
    matches: dict[tuple[str, str], Match] = {}
    missing, done, file = [], 0, None
    for module in checkpoint.mx.values():
        if file != module.codes.file:  # or the mapped pages of all files would count as this process's memory
            file = module.codes.file
            source.close()
            checkpoint.close()
        try:
            found = list(_source_of(module, weights, source))
        except CheckpointError as error:
            missing.append((module.name, str(error)))
            found = []
        for (name, weight), stored in zip(found, matrices(checkpoint.mx_tensor(module.name)), strict=False):
            for preset, differing, first in _compare(weight, stored, presets, rotation, backend, device):
                match = matches.setdefault(
                    (preset, stored.format.name), Match(preset=preset, format=stored.format.name)
                )
                match.tensors += 1
                match.differing_tensors += differing > 0
                match.blocks += stored.scales.numel()
                match.differing += differing
                match.first = match.first or (f"{name}, {first}" if first else "")
        done += module.codes.nbytes + module.scales.nbytes
        progress(done)
    return sorted(matches.values(), key=lambda m: (m.format, presets.index(m.preset))), missing


def _source_of(module: MXModule, weights: Mapping[str, Leaf], source: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Name and unquantised weight of each matrix of a module.

    Raises:
        CheckpointError: the source has none, or one of another shape or dtype, or scales are shared between rows.
    """
    if module.block_rows != 1:
        raise CheckpointError(f"{module.block_rows} rows share their scales; no preset makes such")
    fused = split_fused(module.name) if len(module.shape) == 3 else None
    names = [module.name] if fused is None else [f"{fused[0]}.{e}.{fused[1]}" for e in range(module.shape[0])]
    for name in names:
        weight = _weight(name, weights, source)
        if weight is None:
            raise CheckpointError(f"{source.path} has no weight of {name}")
        if tuple(weight.shape) != module.shape[-2:] or weight.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"the weight of {name} in {source.path} is {weight.dtype} {list(weight.shape)}, not a float matrix of "
                f"shape {list(module.shape[-2:])}"
            )
        yield name, weight


def _weight(module: str, weights: Mapping[str, Leaf], source: Checkpoint) -> Tensor | None:
    """An unquantised weight, mapped from its file, under any spelling of its name."""
    leaf = next((weights[name] for name in spellings(module) if name in weights), None)
    if leaf is not None:
        return leaf.view(source.tensor(leaf.source.name))
    expert = split_expert(module)
    if expert is None or expert[2] not in _HALVES:
        return None
    both = next((weights[n] for n in spellings(f"{expert[0]}.{expert[1]}.gate_up_proj") if n in weights), None)
    return None if both is None else both.view(source.tensor(both.source.name))[_HALVES[expert[2]] :: 2]


_HALVES = {"gate_proj": 0, "up_proj": 1}
"""Which rows of an interleaved ``gate_up_proj``, the only kind that stays whole, llm-compressor splits off."""


def _compare(
    weight: Tensor, stored: MXTensor, presets: Sequence[str], rotation: str | None, backend: str, device: str
) -> Iterator[tuple[str, int, str]]:
    """Each preset with how many blocks differ, and the first of them."""
    fmt = stored.format
    by_recipe: dict[Recipe, list[str]] = {}
    for preset in presets:
        by_recipe.setdefault(PRESETS[preset].recipe(fmt, Role.WEIGHT), []).append(preset)
    step = max(1, _CHUNK // stored.k)
    for names in by_recipe.values():
        count, first = 0, ""
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            values = weight[rows].contiguous().to(device)
            values = values if rotation is None else rotate_weight(values)
            made = quantize(values, fmt, preset=names[0], backend=backend)
            given = stored[rows].to(device)
            found = _differing(made, given)  # [rows, blocks]
            count += int(found.sum())
            if not first and count:
                first = _first(made, given, found, start)
        for preset in names:
            yield preset, count, first


def _differing(a: MXTensor, b: MXTensor) -> Tensor:
    """Which blocks differ in their scale or in any code, bool [rows, blocks]."""
    codes: Tensor = a.packed != b.packed
    in_block: Tensor = codes.unflatten(-1, (a.scales.shape[-1], -1)).any(-1)
    return in_block | (a.scales != b.scales)


def _first(made: MXTensor, given: MXTensor, differing: Tensor, start: int) -> str:
    """The first block that differs, and its first code that does."""
    row, block = differing.nonzero()[0].tolist()
    scales = made.scales[row, block].item(), given.scales[row, block].item()
    place = slice(block * made.format.block_size, (block + 1) * made.format.block_size)
    ours, theirs = made[row : row + 1].codes()[0, place], given[row : row + 1].codes()[0, place]
    where = f"row {start + row}, block {block}: scale {scales[0]} expected, {scales[1]} found"
    if not (other := (ours != theirs).nonzero()).numel():
        return where
    j = int(other[0])
    return f"{where}; its value {j}: code 0x{int(ours[j]):x} expected, 0x{int(theirs[j]):x} found"
