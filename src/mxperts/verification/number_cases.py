"""Cases of ``quantize``, ``fake_quantize``, ``dequantize`` and packing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mxperts.formats import BlockFormat, Recipe, Role
from mxperts.ops.quantize import dequantize, fake_quantize, quantize
from mxperts.packing import unpack
from mxperts.tensor import MXTensor
from mxperts.verification import definition
from mxperts.verification.case import Case, number, patterns, tensor
from mxperts.verification.definition import BLOCK, Bits, Float, canonical
from mxperts.verification.numbers import Family


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize(Case):
    """``quantize`` of weights, or ``fake_quantize`` of activations."""

    block: BlockFormat
    recipe: Recipe
    role: Role
    family: Family

    @property
    def operation(self) -> str:
        return "quantize" if self.role is Role.WEIGHT else "fake_quantize"

    @property
    def name(self) -> str:
        return f"{self.format}/{self.operation}/{self.preset}/{self.family.name}"

    @property
    def work(self) -> Hashable:
        return self.format, self.operation, self.recipe, self.family.name

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        x = tensor(self.family.patterns, self.family.dtype, device)
        if self.role is Role.ACTIVATION:
            values = fake_quantize(x, self.block, preset=self.preset, backend=backend)
            return {"values": canonical(patterns(values, self.family.dtype), self.family.dtype)}
        t = quantize(x, self.block, preset=self.preset, backend=backend)
        return {"codes": unpack(t.packed, self.block).cpu().numpy(), "scales": t.scales.cpu().numpy()}

    def answer(self) -> Mapping[str, Bits]:
        x, dtype = self.family.patterns, self.family.dtype
        codes, scales = definition.quantize(x, dtype, self.block, self.recipe)
        if self.role is Role.WEIGHT:
            return {"codes": codes, "scales": scales}
        return {"values": definition.dequantize(codes, scales, self.block, dtype)[:, : x.shape[1]]}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.format}/inputs/{self.family.name}": self.family.patterns}

    def where(self, part: str, index: Sequence[int]) -> str:
        x, dtype = self.family.patterns[index[0]], self.family.dtype
        block = index[1] if part == "scales" else index[1] // BLOCK
        inside = x[block * BLOCK : (block + 1) * BLOCK].astype(np.int64) & (dtype.sign - 1)
        within = f"a block whose largest magnitude is {number(int(inside.max()), dtype)}"
        if part == "scales":
            return f"{self.family.name} row {index[0]}, scale {block} of {within}"
        given = number(int(x[index[1]]), dtype) if index[1] < len(x) else "padding"
        return f"{self.family.name} row {index[0]}, value {index[1]}: {given} in {within}"

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.family.dtype) if part == "values" else super().shown(part, pattern)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dequantize(Case):
    """``dequantize`` of every code under every scale."""

    block: BlockFormat
    dtype: Float

    @property
    def operation(self) -> str:
        return "dequantize"

    @property
    def name(self) -> str:
        return f"{self.format}/dequantize/{self.dtype.name}"

    @cached_property
    def _codes(self) -> Bits:
        count = 1 << self.block.element.bits
        return np.tile(np.arange(max(count, BLOCK)) % count, (256, 1)).astype(np.uint8)

    @cached_property
    def _scales(self) -> Bits:
        return np.repeat(np.arange(256, dtype=np.uint8)[:, None], self._codes.shape[1] // BLOCK, axis=1)

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        t = MXTensor(
            torch.from_numpy(definition.pack(self._codes, self.block)).to(device),
            torch.from_numpy(self._scales).to(device),
            self.block,
            self._codes.shape[1],
        )
        values = dequantize(t, self.dtype.torch, backend=backend)
        return {"values": canonical(patterns(values, self.dtype), self.dtype)}

    def answer(self) -> Mapping[str, Bits]:
        return {"values": definition.dequantize(self._codes, self._scales, self.block, self.dtype)}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.format}/inputs/codes": self._codes, f"{self.format}/inputs/scales": self._scales}

    def where(self, part: str, index: Sequence[int]) -> str:
        return f"code 0x{self._codes[tuple(index)]:02x} under scale 0x{index[0]:02x}"

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing(Case):
    """Codes to bytes and back: every code at every place of a group, in a row that is not whole blocks too."""

    block: BlockFormat

    @property
    def operation(self) -> str:
        return "packing"

    @property
    def name(self) -> str:
        return f"{self.format}/packing"

    @cached_property
    def _codes(self) -> Bits:
        count = 1 << self.block.element.bits
        return ((np.arange(count)[:, None] + 7 * np.arange(2 * BLOCK)) % count).astype(np.uint8)

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        codes = torch.from_numpy(self._codes).to(device)
        scales = torch.zeros(len(codes), 2, dtype=torch.uint8, device=device)
        t = MXTensor.from_codes(codes, scales, self.block)
        tail = MXTensor.from_codes(codes[:, :-5], scales, self.block)
        found = {"packed": t.packed, "codes": t.codes(), "tail": tail.packed}
        return {part: data.cpu().numpy() for part, data in found.items()}

    def answer(self) -> Mapping[str, Bits]:
        tail = np.pad(self._codes[:, :-5], ((0, 0), (0, 5)))
        pack = definition.pack
        return {"packed": pack(self._codes, self.block), "codes": self._codes, "tail": pack(tail, self.block)}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.name}.codes": self._codes}

    def where(self, part: str, index: Sequence[int]) -> str:
        return f"{part} row {index[0]}, byte {index[1]}"
