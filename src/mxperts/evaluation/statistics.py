"""Estimates with standard errors, from one number a token.

Every standard error treats tokens as independent draws, as llama.cpp's ``llama-perplexity`` does. Neighbouring tokens
are not quite independent, so the errors are a little too small; between schemes measured on the same text they rank
differences correctly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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


def percentile(samples: Tensor, percent: float) -> Estimate:
    """A percentile, linearly interpolated; its standard error needs no assumption on how the samples are distributed.

    The share of samples below the percentile has a standard error of d = sqrt(p (1 - p) / n), and the percentile's is
    half the distance between the percentiles p - d and p + d (Woodruff 1952).

    Args:
        samples: float64 [n].
        percent: 0 … 100; 0 is the minimum and 100 the maximum, of which no error is known: NaN.
    """
    p = percent / 100
    d = math.sqrt(p * (1 - p) / samples.numel())
    low, value, high = np.quantile(samples.numpy(), [max(p - d, 0.0), p, min(p + d, 1.0)]).tolist()
    return Estimate(value, (high - low) / 2 if 0 < p < 1 else math.nan)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many samples fall where, on a logarithmic axis.

    Attributes:
        edges: of the bins, in increasing order.
        counts: samples from each edge up to the next.
        below, above: samples below the first edge, zeros included, and from the last edge on; NaN is in neither.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    @classmethod
    def of(cls, samples: Tensor, *, decades: tuple[int, int], a_decade: int) -> Histogram:
        """Count.

        Args:
            samples: float64 [n].
            decades: exponents of ten of the first and the last edge.
            a_decade: bins in every decade.
        """
        steps = range(decades[0] * a_decade, decades[1] * a_decade + 1)
        edges = tuple(10 ** (step / a_decade) for step in steps)
        values = samples.numpy()
        places = np.searchsorted(edges, values[~np.isnan(values)], side="right")
        counts = np.bincount(places, minlength=len(edges) + 1).tolist()
        return cls(edges=edges, counts=tuple(counts[1:-1]), below=counts[0], above=counts[-1])
