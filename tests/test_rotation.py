"""The rotation against the matrix itself, in exact integers, and against butterflies written out, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.rotation import check_rotation, rotate_input, rotate_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sylvester(n: int) -> list[list[int]]:
    """The matrix by its recursion: [[H, H], [H, -H]]."""
    if n == 1:
        return [[1]]
    half = sylvester(n // 2)
    return [row + row for row in half] + [row + [-v for v in row] for row in half]


H32 = sylvester(32)


def butterflies(x: np.ndarray, strides: tuple[int, ...], factor: float) -> np.ndarray:
    """One row of float32 as the definition words it, one sum at a time."""
    y = [np.float32(v) for v in x]
    for stride in strides:
        for block, i in itertools.product(range(0, len(y), 32), range(32)):
            if (i // stride) % 2 == 0:
                a, b = y[block + i], y[block + i + stride]
                y[block + i], y[block + i + stride] = a + b, a - b
    return np.array([v * np.float32(factor) for v in y], np.float32)


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, so that sums round."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp2(torch.randint(-12, 12, shape, generator=g))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def test_matrix_is_symmetric_and_its_square_is_32() -> None:
    for i, j in itertools.product(range(32), range(32)):
        assert H32[i][j] == H32[j][i] == (-1) ** bin(i & j).count("1")
        assert sum(a * b for a, b in zip(H32[i], H32[j], strict=True)) == (32 if i == j else 0)


@pytest.mark.parametrize(("rotate", "factor"), [(rotate_input, 4), (rotate_weight, 8)])
def test_integers_are_multiplied_by_the_matrix(rotate: object, factor: int) -> None:
    x = torch.randint(-1000, 1000, (5, 96), generator=torch.Generator().manual_seed(1))
    expected = [
        [sum(h * v for h, v in zip(row, block, strict=True)) for block in token.reshape(-1, 32).tolist() for row in H32]
        for token in x
    ]
    found = rotate(x.float())  # type: ignore[operator]
    assert found.dtype is torch.float32
    assert (found.double() * factor).tolist() == expected


def test_products_stay_what_they_are() -> None:
    g = torch.Generator().manual_seed(2)
    x, w = (torch.randint(-100, 100, (n, 64), generator=g).float() for n in (3, 7))
    assert torch.equal(rotate_input(x) @ rotate_weight(w).T, x @ w.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rotate", "factor"), [(rotate_input, 0.25), (rotate_weight, 0.125)])
def test_bits_are_those_of_the_butterflies(rotate: object, factor: float, dtype: torch.dtype) -> None:
    x = wide(20, 64).to(dtype)
    expected = np.stack([butterflies(row, (1, 2, 4, 8, 16), factor) for row in x.float().numpy()])
    assert torch.equal(bits(rotate(x)), bits(torch.from_numpy(expected)))  # type: ignore[operator]


def test_another_order_gives_other_bits() -> None:
    """So that the test above would notice one."""
    x = wide(20, 64)
    other = np.stack([butterflies(row, (16, 8, 4, 2, 1), 0.25) for row in x.numpy()])
    assert not torch.equal(bits(rotate_input(x)), bits(torch.from_numpy(other)))


def test_rows_and_blocks_are_by_themselves() -> None:
    x = wide(2, 3, 96)
    y = rotate_input(x)
    assert torch.equal(y[1, 2, 32:64], rotate_input(x[1, 2, 32:64]))
    assert torch.equal(rotate_input(x.transpose(0, 1)), y.transpose(0, 1))
    assert rotate_input(x[:0]).shape == (0, 3, 96)


def test_inf_and_nan_reach_their_block_alone() -> None:
    x = wide(3, 96)
    x[0, 40], x[1, 40], x[2, 40] = torch.inf, torch.nan, torch.inf
    x[2, 33] = torch.inf
    y = rotate_input(x)
    assert torch.equal(y[:, :32], rotate_input(x[:, :32]))
    assert torch.equal(y[:, 64:], rotate_input(x[:, 64:]))
    assert y[0, 32:64].isinf().all()
    assert y[1, 32:64].isnan().all()
    assert (~y[2, 32:64].isfinite()).all()
    assert y[2, 32:64].isnan().any()  # Inf - Inf


@pytest.mark.parametrize("rotate", [rotate_input, rotate_weight])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 40), r"whole blocks of 32, but [xw] has 40 values in a row"),
        (torch.ones(2, 32, dtype=torch.float64), "not torch.float64"),
        (torch.ones(()), "at least one dimension"),
        ([1.0] * 32, "not list"),
    ],
)
def test_refusals(rotate: object, value: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rotate(value)  # type: ignore[operator]


def test_unknown_rotations_are_refused() -> None:
    check_rotation(None, k=33)
    check_rotation("hadamard32", k=64)
    with pytest.raises(ArgumentError, match=r"unknown rotation 'hadamard16'.*hadamard32"):
        check_rotation("hadamard16")
