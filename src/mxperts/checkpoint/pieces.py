"""What a checkpoint in the making consists of, and regrouping it: every layout cuts experts up in its own way."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxperts.checkpoint.layout import TensorNames
from mxperts.checkpoint.names import ALTERNATING_ROWS, split_expert, split_fused
from mxperts.checkpoint.rewrite import Job
from mxperts.checkpoint.safetensors_file import DTYPES, Entry
from mxperts.checkpoint.stored import codes_dtype
from mxperts.errors import CheckpointError
from mxperts.formats import Scheme

UNQUANTISED = Scheme("none")
GATE_UP = "gate_up_proj"


class Role(enum.Enum):
    """What the tensors of a piece are to its module."""

    WEIGHT = enum.auto()
    BIAS = enum.auto()
    INPUT_SCALE = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tensors of one module that are made together.

    Attributes:
        module: the module's name; for ``Role.OTHER`` that of the tensor.
        role: what the tensors are to it.
        scheme: of a weight.
        dtypes, shapes: of the tensors: the codes [..., N, bytes] and scales [..., N, K/32] of a quantised weight, or
            one that is no codes.
        make: gives them.
        nbytes: bytes of the source that they are made of.
        kind: see ``mxperts.checkpoint.inspect.KINDS``.
    """

    module: str
    role: Role = Role.OTHER
    scheme: Scheme = UNQUANTISED
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[], Sequence[Tensor]]
    nbytes: int
    kind: str


def job(piece: Piece, names: TensorNames) -> Job:
    """The step that writes a piece under a layout's names.

    Raises:
        CheckpointError: a row of codes is no whole number of blocks, and the layout has a dimension for these.
    """
    entries = tuple(_entries(piece, names))

    def make() -> Iterable[Tensor]:
        for entry, tensor in zip(entries, piece.make(), strict=True):
            yield tensor.view(entry.dtype).reshape(entry.shape)

    return Job(outputs=entries, make=make, nbytes=piece.nbytes, kind=piece.kind)


def _entries(piece: Piece, names: TensorNames) -> Iterable[Entry]:
    fmt = piece.scheme.weight
    if fmt is None:
        suffix, shape = {
            Role.WEIGHT: (".weight", piece.shapes[0]),
            Role.BIAS: (names.bias if split_fused(piece.module) else ".bias", piece.shapes[0]),
            Role.INPUT_SCALE: (names.input_scale, names.input_scale_shape),
            Role.OTHER: ("", piece.shapes[0]),
        }[piece.role]
        yield Entry(name=f"{piece.module}{suffix}", dtype=piece.dtypes[0], shape=shape)
        return
    codes, scales = piece.shapes
    if names.blocked:
        if codes[-1] % fmt.block_bytes:
            raise CheckpointError(
                f"{piece.module}: rows of {codes[-1]} bytes are no whole number of blocks of {fmt}, "
                f"{fmt.block_bytes} bytes each, which this layout needs"
            )
        codes = (*codes[:-1], codes[-1] // fmt.block_bytes, fmt.block_bytes)
    yield Entry(name=piece.module + names.codes_suffix(fmt), dtype=codes_dtype(fmt), shape=codes)
    dtype = DTYPES[names.scale_dtypes.get(fmt.name, "U8")]
    yield Entry(name=piece.module + names.scales, dtype=dtype, shape=scales)


def regroup(pieces: Iterable[Piece], names: TensorNames) -> list[Piece]:
    """The pieces of a model whose rows of gate and up alternate, in the tensors that a layout has for its experts.

    Raises:
        CheckpointError: gate and up are stored apart and cannot be brought together.
    """
    apart = [one for piece in pieces for one in _unstack(piece)]
    if GATE_UP in names.alternating:
        parts = _merge(apart, _expert_of_gate_or_up, _interleave)
    else:
        parts = [part for piece in apart for part in _split(piece)]
    return stack_experts(parts) if names.stacked else parts


def stack_experts(pieces: Iterable[Piece]) -> list[Piece]:
    """Every projection of all experts in one tensor [E, ...]."""
    return _merge(pieces, _projection_of_experts, _stack)


def _merge(
    pieces: Iterable[Piece], key: Callable[[Piece], Hashable | None], merge: Callable[[list[Piece]], Piece]
) -> list[Piece]:
    """Pieces of the same key become one, where the first of them was; those without one stay."""
    groups: dict[Hashable, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(key(piece) or id(piece), []).append(piece)
    return [group[0] if key(group[0]) is None else merge(group) for group in groups.values()]


def _expert_of_gate_or_up(piece: Piece) -> Hashable | None:
    expert = split_expert(piece.module) if piece.role is not Role.OTHER else None
    return (*expert[:2], piece.role) if expert is not None and expert[2] in ALTERNATING_ROWS else None


def _projection_of_experts(piece: Piece) -> Hashable | None:
    expert = split_expert(piece.module) if piece.role is not Role.OTHER else None
    return (expert[0], expert[2], piece.role) if expert is not None else None


def _unstack(piece: Piece) -> Iterable[Piece]:
    """[E, ...] -> E pieces."""
    fused = split_fused(piece.module) if piece.role is not Role.OTHER else None
    if fused is None:
        yield piece
        return
    experts, projection = fused
    count = piece.shapes[0][0]
    for e in range(count):

        def make(e: int = e) -> Sequence[Tensor]:
            return [t[e] for t in piece.make()]

        yield replace(
            piece,
            module=f"{experts}.{e}.{projection}",
            shapes=tuple(shape[1:] for shape in piece.shapes),
            make=make,
            nbytes=piece.nbytes // count,
        )


def _stack(pieces: list[Piece]) -> Piece:
    """The inverse of ``_unstack``."""
    expert = split_expert(pieces[0].module)
    assert expert is not None
    ordered = sorted(pieces, key=lambda piece: (split_expert(piece.module) or expert)[1])
    return _together(ordered, f"{expert[0]}.{expert[2]}", lambda shape: (len(pieces), *shape), range(len(pieces)))


def _split(piece: Piece) -> Iterable[Piece]:
    """``gate_up_proj`` -> ``gate_proj`` and ``up_proj``; a scale of the input is that of both."""
    expert = split_expert(piece.module)
    if piece.role is Role.OTHER or expert is None or expert[2] != GATE_UP:
        yield piece
        return
    for name, rows in ALTERNATING_ROWS.items():
        part = slice(None) if piece.role is Role.INPUT_SCALE else rows

        def make(part: slice = part) -> Sequence[Tensor]:
            return [t[part] if t.ndim else t for t in piece.make()]

        yield replace(
            piece,
            module=f"{expert[0]}.{expert[1]}.{name}",
            shapes=tuple((len(range(s[0])[part]), *s[1:]) if s else s for s in piece.shapes),
            make=make,
            nbytes=piece.nbytes // len(ALTERNATING_ROWS),
        )


def _interleave(pieces: list[Piece]) -> Piece:
    """The inverse of ``_split``."""
    gate, *rest = sorted(pieces, key=lambda piece: piece.module)
    expert = split_expert(gate.module)
    assert expert is not None
    module = f"{expert[0]}.{expert[1]}.{GATE_UP}"
    if [replace(gate, module=up.module, make=up.make) for up in rest] != rest or len(rest) != 1:
        raise CheckpointError(
            f"{module}: gate and up are to be one tensor, but they are "
            + " and ".join(f"{p.module} {list(p.shapes[0])} {p.scheme}" for p in (gate, *rest))
        )
    if gate.role is not Role.INPUT_SCALE:
        return _together([gate, *rest], module, lambda s: (2 * s[0], *s[1:]), list(ALTERNATING_ROWS.values()))
    a, b = (float(piece.make()[0]) for piece in (gate, *rest))
    if a != b:
        raise CheckpointError(f"{module}: the inputs of gate and up have scales {a} and {b}; one tensor can have one")
    return replace(gate, module=module, nbytes=2 * gate.nbytes)


def _together(
    pieces: Sequence[Piece],
    module: str,
    whole: Callable[[tuple[int, ...]], tuple[int, ...]],
    places: Sequence[int | slice],
) -> Piece:
    """Pieces alike as one, each of them at its place along the first dimension."""
    first = pieces[0]
    shapes = tuple(whole(shape) for shape in first.shapes)

    def make() -> Sequence[Tensor]:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, first.dtypes, strict=True)]
        for piece, place in zip(pieces, places, strict=True):
            for tensor, part in zip(tensors, piece.make(), strict=True):
                tensor[place] = part
        return tensors

    return replace(first, module=module, shapes=shapes, make=make, nbytes=sum(piece.nbytes for piece in pieces))
