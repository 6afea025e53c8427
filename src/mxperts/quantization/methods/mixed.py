"""Which format every layer gets when bits are limited: the choice with the least total error.

This is the multiple-choice knapsack problem, solved exactly. With a price on every byte, each layer would simply take
its cheapest format; the right price makes that a lower bound for all allocations within the limit, and nearly one of
them. Partial allocations that already cost more than an allocation that is known are dropped, and so are those that
another beats in both size and error. Few are ever left.

Source: Kellerer, Pferschy, Pisinger, Knapsack Problems, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mxperts.errors import ArgumentError
from mxperts.formats import Scheme


@dataclass(frozen=True, kw_only=True)
class _Option:
    """One format of one layer."""

    scheme: Scheme
    size: int
    error: float


def allocate(
    costs: Mapping[str, Mapping[Scheme, tuple[int, float]]], *, bits: float, values: Mapping[str, int]
) -> dict[str, Scheme]:
    """The scheme of every layer that makes the sum of errors least, at no more than ``bits`` bits a weight on average.

    Args:
        costs: of every layer what each candidate takes, in bytes of codes and scales, and the error that it makes, in a
            unit that adds up over layers.
        bits: the most bits a weight, scales included; codes and scales of all layers over their weights.
        values: number of weights of every layer.

    Returns:
        A scheme for every layer; no other choice within ``bits`` has a smaller sum of errors. Of several with the same
        error and size, the one whose candidates were named first.

    Raises:
        ArgumentError: there are no layers or no candidates, ``costs`` and ``values`` name different layers, an error is
            not finite, or ``bits`` is less than the smallest candidates take.
    """
    layers = {name: _useful(name, candidates) for name, candidates in costs.items()}
    if not layers or layers.keys() != values.keys():
        raise ArgumentError(
            f"costs are given for {len(layers)} layers and values for {len(values)}; both must name the same layers"
        )
    total = sum(values.values())
    least = sum(options[0].size for options in layers.values())
    limit = math.floor(Fraction(bits) * total / 8) if math.isfinite(bits) else -1
    if limit < least:
        raise ArgumentError(
            f"{bits} bits a weight is less than the smallest candidates take, {least * 8 / total:.4f}; ask for more "
            "bits or allow smaller formats"
        )
    chosen = _solve(list(layers.values()), limit)
    return {name: option.scheme for name, option in zip(layers, chosen, strict=True)}


def _useful(name: str, candidates: Mapping[Scheme, tuple[int, float]]) -> list[_Option]:
    """The candidates of a layer by growing size and falling error, without those that another beats in both."""
    for scheme, (_, error) in candidates.items():
        if not math.isfinite(error):
            raise ArgumentError(f"{name}: the error of {scheme} is {error}; it must be finite")
    if not candidates:
        raise ArgumentError(f"{name} has no candidates to choose from")
    options = [_Option(scheme=scheme, size=size, error=error) for scheme, (size, error) in candidates.items()]
    useful: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.error)):
        if not useful or option.error < useful[-1].error:
            useful.append(option)
    return useful


def _solve(layers: Sequence[Sequence[_Option]], limit: int) -> list[_Option]:
    price, feasible = _price(layers, limit)
    priced = [[option.error + price * option.size for option in options] for options in layers]
    bound = sum(map(min, priced)) - price * limit
    slack = sum(option.error for option in feasible) - bound
    slack += 1e-9 * (abs(slack) + sum(abs(option.error) for option in feasible))  # sums are rounded
    smallest = np.cumsum([0, *(options[0].size for options in reversed(layers))])[::-1]  # of the layers from here on

    size, error, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)  # of partial allocations
    links: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # option taken, and the partial allocation before it
    for i, options in enumerate(layers):
        least = min(priced[i])
        sizes = (size[None] + np.array([[o.size] for o in options])).ravel()
        errors = (error[None] + np.array([[o.error] for o in options])).ravel()
        excesses = (excess[None] + np.array([[p - least] for p in priced[i]])).ravel()
        (kept,) = np.nonzero((sizes + smallest[i + 1] <= limit) & (excesses <= slack))
        kept = kept[np.lexsort((errors[kept], sizes[kept]))]
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], errors[kept][:-1]]))
        kept = kept[errors[kept] < best_before]
        links.append((kept // len(size), kept % len(size)))
        size, error, excess = sizes[kept], errors[kept], excesses[kept]

    at = int(np.argmin(error))
    chosen: list[_Option] = []
    for options, (option, before) in zip(reversed(layers), reversed(links), strict=True):
        chosen.append(options[int(option[at])])
        at = int(before[at])
    return chosen[::-1]


def _price(layers: Sequence[Sequence[_Option]], limit: int) -> tuple[float, list[_Option]]:
    """The error that a byte more saves at the limit, and an allocation within it that lies close to the best.

    From the smallest formats upwards, the step is taken, over all layers, that saves most for each byte.
    """
    steps = [
        ((a.error - b.error) / (b.size - a.size), i, a, b)
        for i, options in enumerate(layers)
        for a, b in _hull_steps(options)
    ]
    steps.sort(key=lambda step: -step[0])
    chosen = [options[0] for options in layers]
    left = limit - sum(option.size for option in chosen)
    price = 0.0
    for saved, i, a, b in steps:
        if chosen[i] is a and b.size - a.size <= left:
            chosen[i], left = b, left - (b.size - a.size)
        elif not price:
            price = saved
    return price, chosen


def _hull_steps(options: Sequence[_Option]) -> list[tuple[_Option, _Option]]:
    """Neighbours on the lower convex hull of errors over sizes: the steps save less and less for each byte."""
    hull: list[_Option] = []
    for option in options:
        while len(hull) > 1 and _saves(hull[-2], hull[-1]) <= _saves(hull[-1], option):
            hull.pop()
        hull.append(option)
    return list(pairwise(hull))


def _saves(a: _Option, b: _Option) -> float:
    return (a.error - b.error) / (b.size - a.size)
