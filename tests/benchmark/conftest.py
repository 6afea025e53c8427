from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from mxperts.benchmark import Contender, LayerRow, Plan, Problem, bench_layer, choose, parse_shape
from mxperts.benchmark.contenders.base import Bind, Run
from mxperts.benchmark.inputs import Inputs, Weights
from mxperts.benchmark.roofline import Matmul
from mxperts.formats import Scheme

PLAN = Plan(rounds=2, slice=0.002, time_budget=1)


class Broken(Contender):
    """Gives its input back."""

    name = "broken"

    def memory(self, problem: Problem, copies: int) -> int:
        return 0

    def load(self, problem: Problem, layers: Sequence[Weights]) -> Bind:
        def bind(inputs: Inputs) -> Run:
            def run(i: int) -> Tensor:
                return inputs.call(i).hidden_states

            return run

        return bind


class Huge(Broken):
    """Needs more memory than there is."""

    name = "huge"

    def memory(self, problem: Problem, copies: int) -> int:
        return 1 << 60


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not care how fast the machine is."""
    monkeypatch.setattr("mxperts.benchmark.device.host.Matmul", lambda: Matmul(size=64))


@pytest.fixture(scope="session")
def rows() -> list[LayerRow]:
    """A benchmark of two problems with a baseline, the reference, one wrong contender and one without room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mxperts.benchmark.device.host.Matmul", lambda: Matmul(size=64))
        patch.setattr("mxperts.benchmark.device.host.available_memory", lambda: 1 << 30)
        contenders = [*choose(["reference"], []), Broken(), Huge()]
        shape, scheme = parse_shape("4,2,64,32"), Scheme("w_mxfp4")
        return [
            r for rows in bench_layer([shape], [scheme], [1, 3], contenders, plan=PLAN, cache=1 << 14) for r in rows
        ]
