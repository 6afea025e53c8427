"""Layers with exact answers: what they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from mxperts.formats import BLOCK_FORMATS, BlockFormat, Scheme
from mxperts.verification.definition import BFLOAT16, elements
from mxperts.verification.layers import HIDDEN, TOKENS, Experts, Linear, _check_order, _finest


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_a_linear_layer_holds_every_finite_code_in_every_column(fmt: BlockFormat) -> None:
    weight = Linear(scheme=Scheme.of(fmt), dtype=BFLOAT16).weight
    finite = {code for code, value in enumerate(elements(fmt.element)) if value is not None}
    assert all(set(weight.codes[:, column].tolist()) == finite for column in range(HIDDEN))
    assert not weight.codes[:, HIDDEN:].any()


def test_a_linear_layer_by_hand() -> None:
    layer = Linear(scheme=Scheme("w_mxfp4"), dtype=BFLOAT16)
    values = np.array([[BFLOAT16.value(int(p)) for p in row] for row in layer.answer()], dtype=np.float64)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
    codes = layer.weight.codes[:, :HIDDEN]
    weight = table[codes & 7] * np.where(codes & 8, -1, 1)
    scales = np.ldexp(1.0, layer.weight.scales.astype(int) - 127).repeat(32, axis=1)[:, :HIDDEN]
    assert np.array_equal(values, 7 * (weight * scales).T)


def test_batches_have_tokens_with_two_one_and_no_experts_and_an_expert_has_none() -> None:
    assert TOKENS[:2] == (0, 1)
    layer = Experts(scheme=Scheme("w_mxfp4"), dtype=BFLOAT16)
    ids, weights = layer.routing(TOKENS[-1])
    assert {int((row >= 0).sum()) for row in ids} == {0, 1, 2}
    assert set(np.unique(ids)) == {-1, 0, 1, 2}
    assert set(np.unique(weights)) == {0.5, 1, 2}
    answer = layer.answer(TOKENS[-1])
    assert not answer[(ids < 0).all(1)].any()
    assert len(np.unique(answer)) > 1000
    assert layer.answer(0).shape == (0, HIDDEN)
    assert np.array_equal(layer.answer(6), answer[:6])


def test_sums_that_depend_on_their_order_are_refused() -> None:
    terms = np.array([[1, 1 << 23, 1 << 23]], dtype=object)
    _check_order(terms[:, :2].sum(1), _finest(terms[:, :2]))
    with pytest.raises(AssertionError, match="depends on its order"):
        _check_order(terms.sum(1), _finest(terms))
