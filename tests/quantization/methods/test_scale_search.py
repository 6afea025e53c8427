"""The scale of every block is the best of all that are tried: checked by trying all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, SCALE_BIAS, BlockFormat
from mxperts.quantization.methods import Inputs, Problem, scale_search
from mxperts.quantization.methods.grid import STEPS


def rounded(block: Tensor, fmt: BlockFormat, exponent: int) -> Tensor:
    """The nearest values of a format with one scale, found by looking at all of them, in float64."""
    elements = torch.tensor([v for v in fmt.element.values if -fmt.element.max <= v <= fmt.element.max]).double()
    elements = elements * 2.0**exponent
    return elements[(block.double().unsqueeze(-1) - elements).abs().argmin(-1)]


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("k", [32, 96, 70])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_it_is_the_best_of_all_candidates(
    fmt: BlockFormat, k: int, with_inputs: bool, draw: Callable[..., tuple[Tensor, Tensor]],
    make_inputs: Callable[..., Inputs],
) -> None:  # fmt: skip
    weight, x = draw(6, k, seed=k)
    problem = Problem(weight=weight, format=fmt, inputs=make_inputs(x) if with_inputs else None)
    found = mx.dequantize(scale_search(problem), torch.float64)
    start = mx.quantize(weight, fmt).scales.int() - SCALE_BIAS
    for n in range(6):
        for b in range(fmt.blocks(k)):
            part = slice(32 * b, min(k, 32 * b + 32))
            read = x[:, part].double() if with_inputs else torch.eye(part.stop - part.start).double()
            exact = weight[n, part].double()
            tried = [rounded(weight[n, part], fmt, int(start[n, b]) + step) for step in STEPS]
            losses = [float((read @ (exact - values)).square().sum()) for values in (found[n, part], *tried)]
            assert losses[0] == pytest.approx(min(losses[1:]), rel=1e-4)


def test_scales_of_the_rule_stay_where_nothing_is_better() -> None:
    weight = torch.tensor([[6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0] * 4])  # all of them elements
    found, plain = scale_search(Problem(weight=weight, format=mx.MXFP4)), mx.quantize(weight, mx.MXFP4)
    assert found.scales.equal(plain.scales)
    assert found.packed.equal(plain.packed)


def test_the_scale_rule_is_where_it_starts() -> None:
    weight = torch.full((1, 32), 3.9)  # ceil: 2^0; two steps below that is the first where it saturates badly
    rules = {rule: scale_search(Problem(weight=weight, format=mx.MXFP4, scale_rule=rule)) for rule in ("floor", "ceil")}
    errors = {rule: (mx.dequantize(t, torch.float32) - weight).abs().max().item() for rule, t in rules.items()}
    assert errors["floor"] == errors["ceil"] == pytest.approx(0.1)
