"""Estimates with standard errors, from one number a token.

Every standard error treats tokens as independent draws, as llama.cpp's ``llama-perplexity`` does. Neighbouring tokens
are not quite independent, so the errors are a little too small; between schemes measured on the same text they rank
differences correctly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    stderr: float


def mean(samples: Tensor) -> Estimate:
    """The mean; its standard error is the sample standard deviation (n - 1) over the square root of n.

    Args:
        samples: float64 [n].

    Returns:
        With a single sample the standard error is NaN: nothing is known about it.
    """
    n = samples.numel()
    return Estimate(samples.mean().item(), samples.std().item() / math.sqrt(n) if n > 1 else math.nan)


def perplexity(nll: Tensor) -> Estimate:
    """exp of the mean negative log likelihood; its standard error is propagated: perplexity times that of the mean.

    Args:
        nll: float64 [n], in nats.
    """
    average = mean(nll)
    value = math.exp(average.value) if average.value < 700 else math.inf
    return Estimate(value, value * average.stderr)


def root_mean_square(samples: Tensor) -> Estimate:
    """sqrt(mean(x²)); its standard error is propagated (delta method): that of mean(x²), over twice the value.

    Args:
        samples: float64 [n].

    Returns:
        Where all samples are 0, so is the standard error.
    """
    squares = mean(samples.square())
    value = math.sqrt(squares.value)
    return Estimate(value, squares.stderr / (2 * value) if value else 0.0)


def share(flags: Tensor) -> Estimate:
    """How often a flag is set; its standard error is sqrt(p (1 - p) / (n - 1)).

    Args:
        flags: bool [n].
    """
    return mean(flags.to(torch.float64))
