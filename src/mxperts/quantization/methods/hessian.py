"""The moment of a layer's inputs, made fit for a Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""What is added to the diagonal of a moment, relative to the mean of the diagonal."""
MOVE_DAMPING = 0.2
"""The same for ``moved``, where it keeps what the calibration text says by chance out of the weights."""


def damped(moment: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """A moment [E, K, K] made positive definite on its diagonal, and the upper triangular U for which UᵀU is its
    inverse; both float64.

    ``damping`` times the mean of the diagonal is enough for moments of any data; where rounding made one indefinite,
    ten times as much is tried, and so on. Channels that never had an input, and so padding, stay apart from all others.
    """
    hessian = (moment.to(torch.float64) + moment.mT) / 2
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)  # a view
    mean = diagonal.mean(-1, keepdim=True)  # [E, 1]
    step = torch.where(mean > 0, mean, 1.0)
    diagonal += damping * step
    # The flipped matrix's lower factor, flipped back, is an upper factor R of RRᵀ; U is its inverse
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(-2, -1))
    while len(todo := failed.nonzero().squeeze(-1)):
        damping = max(10 * damping, DAMPING)
        diagonal[todo] += damping * step[todo]
        lower[todo], failed[todo] = torch.linalg.cholesky_ex(hessian[todo].flip(-2, -1))
    eye = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device).expand_as(lower)
    return hessian, torch.linalg.solve_triangular(lower.flip(-2, -1), eye, upper=True)


def moved(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The weights W' for which x̂ W'ᵀ comes nearest to x Wᵀ, in the mean square: W + W (E[xᵀx̂] - E[x̂ᵀx̂]) E[x̂ᵀx̂]⁻¹.

    Args:
        weight: W, float32 [E, N, K].
        moment: E[x̂ᵀx̂] [E, K, K].
        cross: E[xᵀx̂] [E, K, K].
    """
    _, factor = damped(moment, MOVE_DAMPING)
    change = weight.to(torch.float64) @ (cross.to(torch.float64) - moment)
    return weight + (change @ factor.mT @ factor).to(torch.float32)
