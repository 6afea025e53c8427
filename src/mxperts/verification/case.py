"""A case: one comparison of what a backend makes of inputs with the exact answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxperts.verification.definition import Bits, Float


@dataclass(frozen=True, kw_only=True, eq=False)
class Case(ABC):
    """One operation on one tensor, or one layer.

    Attributes:
        format: name of the format, or of the weights' format.
        preset: whose recipe, or "".
        activation: what inputs are quantised to, or "".
    """

    format: str
    preset: str = ""
    activation: str = ""

    @property
    @abstractmethod
    def operation(self) -> str:
        """What is run, for people."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the golden files, without what each part of the answer appends."""

    @property
    def work(self) -> Hashable:
        """Cases of which this is equal have the same inputs and the same answer."""
        return self.name

    @abstractmethod
    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        """What a backend makes of the inputs, part by part."""

    @abstractmethod
    def answer(self) -> Mapping[str, Bits]:
        """The same, exactly."""

    @abstractmethod
    def inputs(self) -> dict[str, Bits]:
        """The inputs by the names of their golden files."""

    def answer_files(self) -> dict[str, Bits]:
        """The answer by the names of its golden files."""
        return {f"{self.name}.{part}": data for part, data in self.answer().items()}

    @abstractmethod
    def where(self, part: str, index: Sequence[int]) -> str:
        """Where a number of the answer stands, and the input it comes from."""

    def shown(self, part: str, pattern: int) -> str:
        """A number of the answer."""
        return f"0x{pattern:02x}"


def tensor(bits: Bits, dtype: Float, device: str) -> Tensor:
    """Patterns as a tensor."""
    signed = bits.view(f"<i{bits.itemsize}")
    return torch.from_numpy(signed).to(device).view(dtype.torch)


def patterns(values: Tensor, dtype: Float) -> Bits:
    """A tensor's bits."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits: Bits = values.contiguous().view(integers).cpu().numpy().view(dtype.bits)
    return bits


def number(pattern: int, dtype: Float) -> str:
    """A pattern and what it stands for."""
    magnitude = pattern & (dtype.sign - 1)
    sign = "-" if pattern & dtype.sign else ""
    if magnitude >= dtype.inf:
        meaning = f"{sign}Inf" if magnitude == dtype.inf else "NaN"
    else:
        meaning = f"{sign}{float(dtype.value(magnitude)):.9g}"
    return f"0x{pattern:0{2 * dtype.bits.itemsize}x} ({meaning})"
