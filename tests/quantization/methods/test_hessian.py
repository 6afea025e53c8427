"""Factors of moments, also of such as have none."""

from __future__ import annotations

import pytest
import torch

from mxperts.quantization.methods.hessian import DAMPING, damped, moved


def test_the_factor_is_that_of_the_inverse() -> None:
    x = torch.randn(2, 100, 48, generator=torch.Generator().manual_seed(0))
    moment = x.mT @ x / 100
    hessian, factor = damped(moment)
    eye = torch.eye(48, dtype=torch.float64)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1).view(2, 1, 1).double()
    torch.testing.assert_close(hessian, moment.double() + DAMPING * mean * eye, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(factor, factor.triu())
    torch.testing.assert_close(factor.mT @ factor @ hessian, eye.expand(2, 48, 48), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "moment",
    [
        torch.zeros(32, 32),
        torch.ones(32, 32),
        torch.diag((torch.arange(32) > 4).float()),
        -torch.eye(32),
        torch.eye(32) - 0.5,  # symmetric, with a large negative eigenvalue
        torch.ones(32, 32) * 1e30,
        torch.ones(32, 32) * 1e-30,
    ],
    ids=["zero", "rank one", "dead channels", "negative", "indefinite", "huge", "tiny"],
)
def test_moments_that_have_no_factor_get_one(moment: torch.Tensor) -> None:
    good = torch.eye(32) * 3
    hessian, factor = damped(torch.stack([moment, good]))
    assert factor.isfinite().all()
    eye = torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(factor.mT @ factor @ hessian, eye.expand(2, 32, 32), rtol=0, atol=1e-6)
    assert hessian[1].equal(damped(good[None])[0][0]), "one bad moment of a stack changes the others"


def test_dead_channels_are_left_apart() -> None:
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 0
    _, factor = damped((x.mT @ x / 100)[None])
    others = torch.arange(32) != 7
    assert not factor[0, 7, others].any()
    assert not factor[0, others, 7].any()


def test_weights_move_to_where_the_output_comes_nearest() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(5000, 32, generator=g)
    read = x * 0.8 + torch.randn(5000, 32, generator=g) * 0.1
    weight = torch.randn(1, 4, 32, generator=g)
    new = moved(weight, (read.mT @ read / 5000)[None], (x.mT @ read / 5000)[None])[0]

    def error(w: torch.Tensor) -> float:
        return float((x @ weight[0].T - read @ w.T).square().mean())

    assert error(new) < 0.7 * error(weight[0])
    ideal = torch.linalg.lstsq(read, x @ weight[0].T).solution.T
    assert error(new) < 1.1 * error(ideal), "the damping costs little"


def test_weights_stay_where_inputs_are_read_as_they_are() -> None:
    weight, moment = torch.randn(1, 4, 32), torch.eye(32)[None]
    assert moved(weight, moment, moment).equal(weight)
