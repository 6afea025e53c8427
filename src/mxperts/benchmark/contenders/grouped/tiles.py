"""Sizes of the tiles of a grouped product, and the choice of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from mxperts.benchmark.device.replay import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a grouped product is cut up; ``m`` rows of one expert, ``group`` blocks of rows that go together."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 1

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


def candidates(tokens: int, top_k: int, experts: int) -> list[Tiles]:
    """Tiles to try: those that vLLM takes if it has none for a device, and some for as many rows as experts get.

    Source: vLLM, ``fused_moe.get_default_config``.
    """
    default = Tiles(
        m=16 if tokens <= 32 else 32 if tokens <= 96 else 64 if tokens <= 512 else 128,
        n=64 if tokens <= 64 else 128,
        k=128 if tokens <= 64 else 64,
        warps=4 if tokens <= 128 else 8,
        stages=4 if tokens <= 32 else 3,
        group=16 if tokens // experts > 128 else 1,
    )
    rows = tokens * top_k / experts
    if rows <= 8:
        more = [
            Tiles(m=16, n=128, k=128, warps=4, stages=3),
            Tiles(m=16, n=32, k=256, warps=4, stages=3),
            Tiles(m=16, n=64, k=64, warps=4, stages=6),
        ]
    elif rows <= 32:
        more = [Tiles(m=16, n=128, k=128, warps=4, stages=3), Tiles(m=32, n=128, k=64, warps=4, stages=4)]
    elif rows <= 96:
        more = [Tiles(m=64, n=128, k=64, warps=4, stages=4), Tiles(m=64, n=256, k=64, warps=8, stages=3)]
    else:
        more = [
            Tiles(m=128, n=128, k=64, warps=8, stages=4, group=8),
            Tiles(m=128, n=256, k=64, warps=8, stages=3, group=8),
        ]
    return list(dict.fromkeys([default, *more]))


def fastest(
    tiles: Sequence[Tiles], make: Callable[[Tiles], Callable[[], object]], stopwatch: Stopwatch | None
) -> Tiles:
    """The tiles with which something takes least time; the first without a stopwatch.

    Those that a device has no room for are left out.

    Raises:
        Exception: the device has room for none, as the last of them raised it.
    """
    if stopwatch is None:
        return tiles[0]
    seconds: dict[Tiles, float] = {}
    failure: Exception | None = None
    for t in tiles:
        try:
            call = make(t)
            call()  # compiles
            seconds[t] = median(stopwatch(call, 5))
        except Exception as error:  # Triton has no common class for what it raises
            failure = error
    if not seconds:
        assert failure is not None, tiles
        raise failure
    return min(seconds, key=lambda t: seconds[t])
