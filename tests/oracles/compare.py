"""Ours against a peer's, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts import MXTensor

SCALE_NAN = 255


def differing(ours: MXTensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Which blocks [n] decode differently or are stored differently; under scale 0xFF the codes mean nothing."""
    other_scale = ours.scales[:, 0] != scales.reshape(-1)
    other_codes = (ours.codes() != codes).any(-1) & (ours.scales[:, 0] != SCALE_NAN)
    return other_scale | other_codes


def assert_differ_exactly_at(found: Tensor, expected: Tensor, x: Tensor, what: str) -> None:
    """``found`` and ``expected`` are the same set of blocks of ``x`` [n, 32]."""
    wrong = found != expected
    if wrong.any():
        i = int(wrong.nonzero()[0])
        which = "differs" if found[i] else "agrees, against expectation"
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {len(x)} blocks; the first, {i}, {which}: "
            f"amax {x[i].abs().max().item()!r}, block {x[i].tolist()}"
        )


def assert_differ_only_at(found: Tensor, allowed: Tensor, x: Tensor, what: str) -> None:
    """``found`` is within ``allowed``: blocks in which a peer's fault may, but need not, show."""
    assert_differ_exactly_at(found & ~allowed, torch.zeros_like(found), x, what)


def exact_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block [n], float64."""
    return x.double().abs().amax(-1)


def rounds_up_to(x: Tensor, power: int, mantissa_bits: int) -> Tensor:
    """Whether the even rule rounds a block's amax up to 2^power, where the peer's arithmetic overflows."""
    return exact_amax(x) >= (2.0 - 2.0 ** -(mantissa_bits + 1)) * 2.0 ** (power - 1)
