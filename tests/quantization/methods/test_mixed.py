"""Formats within a limit of bits: the best of all choices, checked by trying all."""

from __future__ import annotations

import itertools
import random

import pytest

from mxperts.errors import ArgumentError
from mxperts.formats import Scheme
from mxperts.quantization.methods.mixed import allocate

SCHEMES = [Scheme(name) for name in ("w_mxfp4", "w_mxfp6_e2m3", "w_mxfp8_e4m3", "w_mxint8")]
Costs = dict[str, dict[Scheme, tuple[int, float]]]


def size(scheme: Scheme, values: int) -> int:
    assert scheme.weight is not None
    return scheme.weight.nbytes(values)


def problem(rng: random.Random) -> tuple[Costs, dict[str, int]]:
    values = {f"layer{i}": rng.choice([32, 64, 320]) for i in range(rng.randint(1, 6))}
    costs = {
        name: {
            s: (size(s, n), rng.choice([rng.random() * n, float(rng.randint(-1, 3))]))
            for s in rng.sample(SCHEMES, rng.randint(1, 4))
        }
        for name, n in values.items()
    }
    return costs, values


def total(costs: Costs, chosen: dict[str, Scheme]) -> tuple[int, float]:
    picked = [costs[name][s] for name, s in chosen.items()]
    return sum(b for b, _ in picked), sum(e for _, e in picked)


@pytest.mark.parametrize("seed", range(100))
def test_no_other_choice_has_a_smaller_error(seed: int) -> None:
    rng = random.Random(seed)
    costs, values = problem(rng)
    bits = rng.uniform(4.25, 8.3)
    every = [dict(zip(costs, c, strict=True)) for c in itertools.product(*costs.values())]
    within = [total(costs, c)[1] for c in every if total(costs, c)[0] * 8 <= bits * sum(values.values())]
    if not within:
        with pytest.raises(ArgumentError, match="less than the smallest candidates take"):
            allocate(costs, bits=bits, values=values)
        return
    chosen = allocate(costs, bits=bits, values=values)
    nbytes, error = total(costs, chosen)
    assert nbytes * 8 <= bits * sum(values.values())
    assert error == pytest.approx(min(within), abs=1e-9)
    assert chosen == allocate(costs, bits=bits, values=values)


def test_many_layers_take_no_time_and_fill_the_limit() -> None:
    rng = random.Random(0)
    values = {str(i): rng.choice([1 << 20, 3 << 19]) for i in range(3000)}
    costs = {
        k: {s: (size(s, n), rng.lognormvariate(0, 1) * 4.0 ** -(size(s, n) * 8 / n)) for s in SCHEMES}
        for k, n in values.items()
    }
    nbytes, _ = total(costs, allocate(costs, bits=5.0, values=values))
    assert 4.999 < nbytes * 8 / sum(values.values()) <= 5


def test_exactly_the_smallest_fits() -> None:
    costs: Costs = {"a": {SCHEMES[0]: (17, 9.0), SCHEMES[1]: (25, 1.0)}}
    assert allocate(costs, bits=4.25, values={"a": 32}) == {"a": SCHEMES[0]}
    assert allocate(costs, bits=6.25, values={"a": 32}) == {"a": SCHEMES[1]}
    assert allocate(costs, bits=100, values={"a": 32}) == {"a": SCHEMES[1]}


def test_a_larger_format_that_is_no_better_is_not_taken() -> None:
    costs: Costs = {"a": {SCHEMES[2]: (33, 1.0), SCHEMES[1]: (25, 1.0)}}
    assert allocate(costs, bits=8.25, values={"a": 32}) == {"a": SCHEMES[1]}


@pytest.mark.parametrize(
    ("costs", "bits", "message"),
    [
        ({"a": {SCHEMES[0]: (17, 1.0)}}, 4.2, "4.2 bits a weight is less than the smallest candidates take, 4.25"),
        ({"a": {SCHEMES[0]: (17, 1.0)}}, float("nan"), "nan bits"),
        ({"a": {SCHEMES[0]: (17, float("nan"))}}, 5, "a: the error of w_mxfp4 is nan"),
        ({"a": {}}, 5, "a has no candidates"),
        ({}, 5, "must name the same layers"),
        ({"b": {SCHEMES[0]: (17, 1.0)}}, 5, "must name the same layers"),
    ],
)
def test_bad_input_is_refused(costs: Costs, bits: float, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        allocate(costs, bits=bits, values={"a": 32})
