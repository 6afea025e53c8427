"""What the CUDA sources call the properties of a problem: see common.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from mxperts.backend.gpu.cuda.element import bf16_rule
from mxperts.backend.gpu.rule import block_rule
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Role, recipe
from mxperts.ops.prepare import ExpertsLayout

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of dtypes."""
FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "situ", "swiglustep")
"""Activation functions in the order of their numbers."""


@dataclass(frozen=True)
class Hidden:
    """The hidden states.

    Attributes:
        dtype: number of their dtype.
        planes: bf16 numbers that an input of a projection is split into: elements of MX formats have at most 8
            significant bits, as bf16 has, float16 has 11 and float32 24.
    """

    dtype: int
    planes: int

    def macros(self) -> dict[str, str]:
        """As the sources call it."""
        return {"HIDDEN": str(self.dtype), "PLANES": str(self.planes)}


def hidden_macros(dtype: torch.dtype, activation: Activation) -> Hidden:
    """Hidden states whose values, quantised, are inputs."""
    number = DTYPES[dtype]
    return Hidden(number, 1 if isinstance(activation, BlockFormat) else number + 1)


def result_macros(dtype: torch.dtype) -> dict[str, str]:
    """What results are rounded to."""
    return {"RESULT": str(DTYPES[dtype])}


def function_macros(name: str, interleaved: bool) -> dict[str, str]:
    """The activation function."""
    return {
        "FUNCTION": str(FUNCTIONS.index(name.removesuffix("_no_mul"))),
        "GATED": str(int(not name.endswith("_no_mul"))),
        "INTERLEAVED": str(int(interleaved)),
    }


def problem_macros(
    layout: ExpertsLayout, dtype: torch.dtype, out_dtype: torch.dtype, activation: Activation, function: str
) -> dict[str, str]:
    """All that common.cuh asks for."""
    assert layout.weight is not None, "dense weights"
    return {
        **weight_macros(layout.weight),
        **hidden_macros(dtype, activation).macros(),
        **result_macros(out_dtype),
        **quantised(activation),
        **function_macros(function, layout.interleaved),
    }


def weight_macros(fmt: BlockFormat) -> dict[str, str]:
    """The weights' format."""
    return bf16_rule(fmt).macros()


@lru_cache
def quantised(activation: Activation) -> dict[str, str]:
    """How inputs are quantised."""
    if not isinstance(activation, BlockFormat):
        return {"QDQ": str({None: 0, FP8_STATIC: 2, FP8_DYNAMIC: 3}[activation])}
    rule = block_rule(activation, recipe(activation, Role.ACTIVATION))
    to_even = not any((rule.truncates, rule.ties_away, rule.ties_toward_zero))
    assert to_even, "kernels round activations to the nearest even"
    largest = torch.tensor(rule.largest, dtype=torch.float32).view(torch.int32)
    return {
        "QDQ": "1",
        "RULE_CARRY": f"{rule.scale_carry}u",
        "RULE_OFFSET": str(rule.scale_offset),
        "RULE_OVERFLOW": str(rule.scale_overflow),
        "RULE_EMIN": str(rule.emin),
        "RULE_ETOP": str(rule.emin if rule.element.integer else 127),
        "RULE_MANTISSA": str(rule.element.mantissa_bits),
        "RULE_LARGEST": f"{int(largest)}u",
    }
