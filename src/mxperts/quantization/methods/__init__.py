"""Ways to choose the codes and scales of a weight, from round-to-nearest upwards."""

from __future__ import annotations

from collections.abc import Mapping

from mxperts.ops.quantize import quantize
from mxperts.quantization.methods.gptq import gptq
from mxperts.quantization.methods.problem import Inputs, Method, Problem
from mxperts.quantization.methods.scale_search import scale_search
from mxperts.tensor import MXTensor

__all__ = ["METHODS", "Inputs", "Method", "Problem", "gptq", "rtn", "scale_search"]


def rtn(problem: Problem) -> MXTensor:
    """Round to nearest at the scale rule's own scales: ``mxperts.quantize``. Inputs change nothing."""
    return quantize(problem.weight, problem.format, preset=problem.preset, scale_rule=problem.scale_rule)


METHODS: Mapping[str, Method] = {"rtn": rtn, "scale-search": scale_search, "gptq": gptq}
"""Every method by its name."""
