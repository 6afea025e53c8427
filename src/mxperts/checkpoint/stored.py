"""Which tensors of a checkpoint are codes and scales, and whether they are all there and fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint.layout import ModelScheme, Rule
from mxperts.checkpoint.names import SPELLINGS, spellings, split_expert, split_fused
from mxperts.checkpoint.safetensors_file import DTYPES, TensorInfo
from mxperts.errors import CheckpointError
from mxperts.formats import FP8_STATIC, BlockFormat, Scheme
from mxperts.tensor import MXTensor

_CODES = {"mxfp8_e4m3": "F8_E4M3", "mxfp8_e5m2": "F8_E5M2", "mxint8": "I8"}
"""The dtype that codes of a format may have besides U8."""
_SCALES = ("U8", "F8_E8M0")
_FLOATS = ("BF16", "F16", "F32")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts in a layer."""


Complain = Callable[[str, str], None]
"""Called with a tensor, or a module, and what is wrong with it."""


def refuse(tensor: str, what: str) -> None:
    """Raise ``CheckpointError``: who wants to load a checkpoint needs to know of the first thing that is wrong."""
    raise CheckpointError(what)


def codes_dtype(fmt: BlockFormat) -> torch.dtype:
    """The dtype in which codes of a format are written."""
    return DTYPES[_CODES.get(fmt.name, "U8")]


@dataclass(frozen=True, kw_only=True)
class MXModule:
    """A module whose weight is stored quantised.

    Attributes:
        name: the module.
        scheme: what the config says of it.
        codes, scales: the tensors.
        k: values in a row.
        block_rows: rows that share their scales.
        blocked: whether codes have a dimension of blocks before their last.
    """

    name: str
    scheme: Scheme
    codes: TensorInfo
    scales: TensorInfo
    k: int
    block_rows: int
    blocked: bool

    @property
    def format(self) -> BlockFormat:
        """Format of the weight."""
        assert self.scheme.weight is not None
        return self.scheme.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (*self.codes.shape[: -2 if self.blocked else -1], self.k)

    @property
    def values(self) -> int:
        """How many numbers the weight holds."""
        return math.prod(self.shape)


def stored_tensor(
    codes: Tensor, scales: Tensor, fmt: BlockFormat, k: int, *, block_rows: int = 1, parts: int = 1
) -> MXTensor:
    """Stored codes and scales as an MXTensor [..., N, K] that shares their memory where it can.

    Copied are only codes whose last block is not full, which are padded, and scales that several rows share.

    Args:
        codes: [..., N, bytes of a row] of any one-byte dtype, or [..., N, blocks, bytes of a block].
        scales: [..., N, blocks], or [..., ceil(N / block_rows), blocks], of any one-byte dtype.
        fmt: the block format.
        k: values in a row.
        block_rows: rows that share their scales.
        parts: weights of N / parts rows that lie one after the other; rows of two of them share no scales.
    """
    codes, scales = codes.view(torch.uint8), scales.view(torch.uint8)
    if codes.ndim == scales.ndim + 1:
        codes = codes.flatten(-2)
    if padding := fmt.packed_size(k) - codes.shape[-1]:
        codes = torch.nn.functional.pad(codes, (0, padding))
    if block_rows != 1:
        rows = scales.unflatten(-2, (parts, -1)).repeat_interleave(block_rows, dim=-2)
        scales = rows[..., : codes.shape[-2] // parts, :].flatten(-3, -2)
    return MXTensor(codes, scales, fmt, k)


def mx_modules(
    tensors: Mapping[str, TensorInfo], scheme: ModelScheme, config: Mapping[str, Any], complain: Complain = refuse
) -> dict[str, MXModule]:
    """The quantised modules of a checkpoint.

    Args:
        tensors: all tensors, by name.
        scheme: what the checkpoint's config says.
        config: its config.json.
        complain: told of codes or scales that are missing, unexpected, or of the wrong dtype or shape, and of experts
            that are missing or do not fit together.

    Raises:
        CheckpointError: by default, at the first of these.
    """
    found = {}
    for name, scales in tensors.items():
        if name.endswith(scheme.names.scales):
            try:
                module = _module(tensors, scheme, name.removesuffix(scheme.names.scales), scales)
            except CheckpointError as error:
                complain(name, str(error))
            else:
                found[module.name] = module
    _check_no_lone_codes(tensors, scheme, found, complain)
    _check_input_scales(tensors, scheme, found, complain)
    _check_experts(tensors, found, config, complain)
    return found


def _rule(scheme: ModelScheme, module: str) -> Rule:
    return scheme.rule_of(*spellings(module))


def _module(tensors: Mapping[str, TensorInfo], scheme: ModelScheme, name: str, scales: TensorInfo) -> MXModule:
    rule = _rule(scheme, name)
    fmt = rule.scheme.weight
    if fmt is None:
        raise CheckpointError(
            f"{scales.file}: {scales.name} are scales, but by {scheme.layout}'s config {name} is not quantised"
        )
    codes_name = name + scheme.names.codes_suffix(fmt)
    codes = tensors.get(codes_name)
    if codes is None:
        raise CheckpointError(f"{scales.file} has the scales {scales.name}, but no file has their codes {codes_name}")
    dtypes = ("U8", _CODES[fmt.name]) if fmt.name in _CODES else ("U8",)
    if codes.dtype not in dtypes or len(codes.shape) < 2:
        raise CheckpointError(
            f"{codes.file}: {codes.name} is {codes}; expected {' or '.join(dtypes)} with at least two dimensions, the "
            f"codes of {fmt}"
        )
    blocked = scheme.names.blocked
    if blocked and codes.shape[-1] != fmt.block_bytes:
        raise CheckpointError(
            f"{codes.file}: {codes.name} is {codes}; expected its last dimension to be {fmt.block_bytes}, the bytes of "
            f"a block of {fmt}"
        )
    *rows, columns = (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]) if blocked else codes.shape
    k, rest = divmod(columns * 8, fmt.element.bits)
    expected = (*rows[:-1], -(-rows[-1] // rule.block_rows), fmt.blocks(k))
    if rest or scales.dtype not in _SCALES or scales.shape != expected:
        raise CheckpointError(
            f"{scales.file}: {scales.name} is {scales}; expected {' or '.join(_SCALES)} {list(expected)}, a scale for "
            f"each {fmt.block_size} values of {codes.name}, which is {codes}"
        )
    return MXModule(
        name=name,
        scheme=rule.scheme,
        codes=codes,
        scales=scales,
        k=k,
        block_rows=rule.block_rows,
        blocked=blocked,
    )


def _check_no_lone_codes(
    tensors: Mapping[str, TensorInfo], scheme: ModelScheme, found: Mapping[str, MXModule], complain: Complain
) -> None:
    """Codes without scales, and experts that are not quantised though the config says so."""
    suffixes = {scheme.names.codes, *scheme.names.codes_of.values()}
    for name, info in tensors.items():
        for suffix in (s for s in suffixes if name.endswith(s)):
            module = name.removesuffix(suffix)
            if module in found:
                continue
            wanted = _rule(scheme, module).scheme.weight
            # whether another float matrix is a linear layer, or an embedding or router, only the model can say
            if info.dtype not in _FLOATS or (wanted is not None and split_expert(module) is not None):
                complain(
                    name,
                    f"{info.file}: {name} is {info} and there are no scales {module}{scheme.names.scales}; "
                    f"expected {wanted or 'an unquantised weight'} by {scheme.layout}'s config",
                )
        if (fused := split_fused(name)) is not None and info.dtype in _FLOATS:
            experts, projection = fused
            parts = (projection, "gate_proj") if projection == "gate_up_proj" else (projection,)
            leaves = [s for part in parts for s in spellings(f"{experts}.0.{part}")]
            wanted = scheme.scheme_of(name, *leaves).weight
            if wanted is not None:
                complain(name, f"{info.file}: {name} is {info}; expected {wanted} by {scheme.layout}'s config")


def _check_input_scales(
    tensors: Mapping[str, TensorInfo], scheme: ModelScheme, found: Mapping[str, MXModule], complain: Complain
) -> None:
    for module in found.values():
        if module.scheme.activation != FP8_STATIC:
            continue
        name = f"{module.name}{scheme.names.input_scale}"
        info = tensors.get(name)
        if info is None:
            complain(name, f"no file has {name}, the static scale of the input that the config calls for")
        elif info.dtype not in _FLOATS or info.shape not in ((), (1,)):
            complain(name, f"{info.file}: {name} is {info}; expected one number in {' or '.join(_FLOATS)}")


def _check_experts(
    tensors: Mapping[str, TensorInfo], found: Mapping[str, MXModule], config: Mapping[str, Any], complain: Complain
) -> None:
    """All experts of a layer have the same projections in the same shapes, and these fit together."""
    layers: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in _expert_shapes(tensors, found):
        experts, index, projection = name
        layers.setdefault(experts, {}).setdefault(index, {})[projection] = shape
    count = next((n for n in expert_counts(config)), None)
    for experts, by_index in layers.items():
        first = by_index[min(by_index)]
        for index in range(max(by_index) + 1 if count is None else count):
            shapes = by_index.get(index, {})
            missing = [projection for projection in first if projection not in shapes]
            for projection in missing:
                complain(f"{experts}.{index}", f"no file has the weight of {experts}.{index}.{projection}")
            if not missing and shapes != first:
                complain(
                    f"{experts}.{index}",
                    f"{experts}: expert {index} has {_print(shapes)}, expert {min(by_index)} {_print(first)}",
                )
        _check_fit(experts, first, complain)


def _expert_shapes(
    tensors: Mapping[str, TensorInfo], found: Mapping[str, MXModule]
) -> Iterator[tuple[tuple[str, int, str], tuple[int, ...]]]:
    for module in found.values():
        if (expert := split_expert(module.name)) is not None:
            yield expert, module.shape
    for name, info in tensors.items():
        module_name = name.removesuffix(".weight")
        if module_name != name and module_name not in found and (expert := split_expert(module_name)) is not None:
            yield expert, info.shape


def _check_fit(experts: str, shapes: Mapping[str, tuple[int, ...]], complain: Complain) -> None:
    named = {p: shapes[s] for p, group in SPELLINGS.items() for s in group if s in shapes}
    down = named.get("down_proj")
    for projection, shape in named.items():
        if down is None or projection == "down_proj":
            continue
        rows = 2 * down[1] if projection == "gate_up_proj" else down[1]
        if shape != (rows, down[0]):
            complain(
                experts,
                f"{experts}: the projections do not fit together: {_print(shapes)}; with this down projection "
                f"{projection} should be {[rows, down[0]]}",
            )


def expert_counts(config: Mapping[str, Any]) -> Iterator[int]:
    """How many experts a layer has, wherever a config.json says it."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            yield from (holder[key] for key in _EXPERT_COUNTS if type(holder.get(key)) is int)


def _print(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{projection} {list(shape)}" for projection, shape in sorted(shapes.items()))
