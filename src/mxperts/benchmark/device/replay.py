"""Calls that a device runs as a whole, timed by its own clock: how accelerators are timed.

Several calls, of different routings, are recorded once and replayed; so a replay has no gaps in which the device waits
for Python, and one call finds nothing of its weights in the cache that another has left there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from mxperts.benchmark.contenders.base import Run
from mxperts.benchmark.timing import Slice, no_garbage_collection

MIN_REPLAY = 1e-3
"""Seconds that a replay takes at least, so that its start is lost in it."""
MAX_PASSES = 32
"""Most times that the calls are recorded one after another to reach that."""
MAX_REPLAYS = 64
"""Most replays of a slice."""

Record = Callable[[Run, int], Callable[[], object]]
"""Records calls 0 to n - 1 and returns what replays them; raises whatever it likes if they cannot be recorded."""
Stopwatch = Callable[[Callable[[], object], int], Sequence[float]]
"""Runs something n times without a pause: seconds of each time, by the device's clock."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Calls that run as a whole.

    Attributes:
        go: starts them and does not wait.
        calls: how many they are.
        seconds: that all of them take together, about.
        why_not: why they are not recorded but called one by one, if they are.
    """

    go: Callable[[], object]
    calls: int
    seconds: float
    why_not: str = ""


def record(run: Run, calls: int, recorder: Record, stopwatch: Stopwatch) -> Replay:
    """Record calls 0 to ``calls`` - 1, as often as it takes for a replay of ``MIN_REPLAY`` seconds.

    Args:
        run: a contender's, which has run before.
        calls: those that differ.
        recorder: of the device.
        stopwatch: of the device.
    """
    try:
        go = recorder(run, calls)
        seconds = min(stopwatch(go, 3))
        passes = min(MAX_PASSES, math.ceil(MIN_REPLAY / seconds))
        if passes > 1:
            go = recorder(run, calls * passes)
            seconds = min(stopwatch(go, 3))
        return Replay(go=go, calls=calls * passes, seconds=seconds)
    except Exception as error:  # whatever the software behind a contender raises
        first_line = str(error).strip().partition("\n")[0]
        why_not = f"{type(error).__name__}: {first_line}"
    go = one_by_one(run, calls)
    return Replay(go=go, calls=calls, seconds=min(stopwatch(go, 2)), why_not=why_not)


def one_by_one(run: Run, calls: int) -> Callable[[], None]:
    """What calls 0 to ``calls`` - 1 from Python."""

    def go() -> None:
        for i in range(calls):
            run(i)

    return go


def slice_of(replay: Replay, length: float, stopwatch: Stopwatch, rest: float = 0.0) -> Slice:
    """Replays for about so many seconds, each a sample: the mean of its calls.

    Args:
        replay: what to time.
        length: seconds.
        stopwatch: of the device.
        rest: seconds to wait before, so that the device is as cool as it is for a short burst.
    """

    def take() -> tuple[list[float], None]:
        time.sleep(rest)
        with no_garbage_collection():
            if replay.seconds < length:  # clocks and caches get used to this contender
                replay.go()
            times = max(1, min(MAX_REPLAYS, round(length / replay.seconds)))
            return [seconds / replay.calls for seconds in stopwatch(replay.go, times)], None

    return take


def eager_seconds(run: Run, calls: int, stopwatch: Stopwatch) -> float:
    """Seconds of a call among calls that Python makes one after another, as fast as it can."""
    return median(stopwatch(one_by_one(run, calls), 5)) / calls
