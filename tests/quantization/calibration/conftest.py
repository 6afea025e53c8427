"""Token ids, and methods that show what they were given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.methods.problem import Inputs, Problem


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    """Eight windows of 64 tokens, of the 32 that the small models know; two windows run at a time."""
    return calibration_in(tmp_path)


def calibration_in(folder: Path) -> Calibration:
    ids = torch.randint(0, 32, (8 * 64,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "ids.json").write_text(json.dumps(ids))
    return Calibration(text=folder / "ids.json", context=64, batch=128, backend="reference")


class Recorder:
    """A method that rounds what the inputs shift a little, and keeps what it was given."""

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.problems: list[Problem] = []
        self._before = before

    def __call__(self, problem: Problem) -> mx.MXTensor:
        self._before(len(self.problems))
        self.problems.append(problem)
        weight = problem.weight.float()
        if problem.inputs is not None:
            moment = problem.inputs.moment / problem.inputs.moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            weight = weight + 0.1 * weight @ moment
        return mx.quantize(weight, problem.format)

    def inputs_of(self, weight: Tensor) -> Inputs | None:
        """What was given for a linear layer with this weight."""
        for problem in self.problems:
            stacked = problem.weight.reshape(-1, *problem.weight.shape[-2:])
            for number, matrix in enumerate(stacked):
                for start in range(len(matrix)):
                    if torch.equal(matrix[start : start + len(weight)], weight):
                        given = problem.inputs
                        if given is None or problem.weight.ndim == 2:
                            return given
                        cross = None if given.cross is None else given.cross[number]
                        return Inputs(
                            rows=given.rows, moment=given.moment[number], cross=cross, amax=given.amax[number]
                        )
        raise AssertionError("no such weight was quantised")
