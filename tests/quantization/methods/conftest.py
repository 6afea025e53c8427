"""Layers to quantise: weights and correlated inputs, drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxperts.quantization.methods import Inputs


def moments(x: Tensor, read: Tensor | None = None) -> Inputs:
    """The moments of inputs ``x`` [..., T, K], which the layer reads as ``read``."""
    seen = x if read is None else read
    rows = x.shape[-2]
    return Inputs(
        rows=rows,
        moment=seen.mT @ seen / rows,
        cross=None if read is None else x.mT @ read / rows,
        amax=x.abs().amax(-2),
        clean=None if read is None else x.mT @ x / rows,
    )


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    return moments


@pytest.fixture
def draw() -> Callable[..., tuple[Tensor, Tensor]]:
    """A function that draws a weight [N, K] and correlated inputs [T, K] with channels of different sizes."""

    def draw(n: int, k: int, seed: int = 0, rows: int = 400) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, k, generator=g) @ torch.randn(k, k, generator=g)
        return torch.randn(n, k, generator=g), x * torch.randn(k, generator=g).exp()

    return draw
