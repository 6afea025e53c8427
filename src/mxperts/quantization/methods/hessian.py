"""The moment of a layer's inputs, made fit for a Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""What is added to the diagonal of a moment, relative to the mean of the diagonal."""
SHIFT_DAMPING = 0.1
"""The same for ``moved``, where it keeps what the calibration text says by chance out of the weights."""
_ATTEMPTS = 8


def damped(moment: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """A moment [E, K, K] made positive definite on its diagonal, and the upper triangular U for which UᵀU is its
    inverse; both float64.

    ``damping`` times the mean of the diagonal is enough for moments of any data; where rounding made one indefinite,
    ten times as much is tried, and so on. Channels that never had an input, and so padding, stay apart from all others.
    """
    moment = (moment.to(torch.float64) + moment.mT) / 2
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)  # [E]
    step = damping * torch.where(mean > 0, mean, 1.0)
    result, factor = torch.empty_like(moment), torch.empty_like(moment)
    todo = torch.arange(len(moment), device=moment.device)
    for _ in range(_ATTEMPTS):
        tried = moment[todo] + torch.diag_embed(step[todo].unsqueeze(-1).expand(-1, moment.shape[-1]))
        # The flipped matrix's lower factor, flipped back, is an upper factor R of RRᵀ; U is its inverse
        lower, info = torch.linalg.cholesky_ex(tried.flip(-2, -1))
        result[todo], factor[todo] = tried, lower.flip(-2, -1)
        todo = todo[info != 0]
        if not len(todo):
            break
        step[todo] *= 10
    else:  # not even the diagonal is positive: nothing is known of these inputs
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        result[todo] = factor[todo] = eye
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return result, torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)


def moved(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The weights W' for which x̂ W'ᵀ comes nearest to x Wᵀ, in the mean square: W + W (E[xᵀx̂] - E[x̂ᵀx̂]) E[x̂ᵀx̂]⁻¹.

    Args:
        weight: W, float32 [E, N, K].
        moment: E[x̂ᵀx̂] [E, K, K].
        cross: E[xᵀx̂] [E, K, K].
    """
    _, factor = damped(moment, SHIFT_DAMPING)
    change = weight.to(torch.float64) @ (cross.to(torch.float64) - moment)
    return weight + (change @ factor.mT @ factor).to(torch.float32)
