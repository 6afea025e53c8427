"""Timing contenders side by side: in slices that take turns, and only while nothing else uses the machine."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

OTHERS_LIMIT = 0.15
"""Share of one core that other processes may use during a slice; ticks of /proc/stat allow no less."""
ATTEMPTS = 8
"""Times that a disturbed slice is taken again before its round counts as disturbed."""
SLOW_CALL = 0.5
"""Seconds; what takes longer takes part in fewer rounds."""
SLOW_BUDGET = 3.0
"""Seconds for all samples of a slow call together."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to time.

    Attributes:
        rounds: undisturbed rounds to reach.
        slice: seconds that each contender runs in a round.
        time_budget: seconds after which no further round is begun.
    """

    rounds: int = 7
    slice: float = 0.1
    time_budget: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """One turn of everybody.

    Attributes:
        samples: seconds of every call, by contender; slow ones are not in every round.
        disturbed: contenders during whose slice other processes used the machine.
        quiet: whether none of those that take part in every round is among them.
    """

    samples: Mapping[str, Sequence[float]]
    disturbed: frozenset[str]
    quiet: bool

    def counts(self, name: str) -> bool:
        """Whether the samples of a contender are as good as can be."""
        return self.quiet and name not in self.disturbed


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What ``interleave`` measured.

    Attributes:
        rounds: all of them. Those that count are the quiet ones, but for contenders that were in none: any.
    """

    rounds: Sequence[Round]

    def of(self, name: str) -> list[Round]:
        """The rounds that count for a contender."""
        all_of_it = [r for r in self.rounds if name in r.samples]
        return [r for r in all_of_it if r.counts(name)] or all_of_it

    def disturbed(self, name: str) -> bool:
        """Whether other processes used the machine in every round of a contender."""
        return not any(r.counts(name) for r in self.of(name))

    def seconds(self, name: str) -> list[float]:
        """Every call of a contender in the rounds that count."""
        return [seconds for r in self.of(name) for seconds in r.samples[name]]

    def ratio(self, numerator: str, name: str) -> float:
        """Median of the ratios of the times of ``numerator``, which is in every round, to those of a contender."""
        return median(median(r.samples[numerator]) / median(r.samples[name]) for r in self.of(name))


Slice = Callable[[], tuple[list[float], float | None]]
"""Runs a contender for a while: seconds of each call, and cores that other processes used meanwhile, if known."""


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    plan: Plan,
    seconds: Mapping[str, float],
    *,
    clock: Callable[[], float] = lambda: time.perf_counter_ns() * 1e-9,
) -> Timings:
    """Time calls in rounds by the processor's clock; see ``take_turns``.

    Args:
        calls: by contender, what runs call ``i``. They go on counting from slice to slice.
        plan: how long.
        seconds: about how long a call takes, by contender.
        clock: seconds.
    """
    slices = {
        name: partial(_slice, call, count(2), plan.slice, seconds[name], clock)  # calls 0 and 1 were made before
        for name, call in calls.items()
    }
    return take_turns(slices, plan, seconds, clock=clock)


def take_turns(
    slices: Mapping[str, Slice],
    plan: Plan,
    seconds: Mapping[str, float],
    *,
    clock: Callable[[], float] = lambda: time.perf_counter_ns() * 1e-9,
) -> Timings:
    """Time contenders in rounds; in each round every one gets a slice, each time another one first.

    Args:
        slices: by contender, what runs it for a slice.
        plan: how long.
        seconds: about how long a call takes, by contender; slow ones take part in the first rounds only.
        clock: seconds.
    """
    limits = {name: rounds_for(seconds[name], plan.rounds) for name in slices}
    rounds: list[Round] = []
    start = clock()
    slow = {name for name in slices if seconds[name] > SLOW_CALL}
    while not rounds or (sum(r.quiet for r in rounds) < plan.rounds and clock() - start < plan.time_budget):
        over = {name for name in slow if sum(name in r.samples for r in rounds) >= limits[name]}
        names = [name for name in slices if name not in over]
        if not names:
            break
        turn = len(rounds) % len(names)
        samples, disturbed = {}, set()
        for name in names[turn:] + names[:turn]:
            for _ in range(1 if name in slow else ATTEMPTS):
                samples[name], others = slices[name]()
                quiet = others is None or others <= OTHERS_LIMIT
                if quiet or clock() - start > plan.time_budget:
                    break
                time.sleep(plan.slice / 2)
            if not quiet:
                disturbed.add(name)
        rounds.append(Round(samples=samples, disturbed=frozenset(disturbed), quiet=disturbed <= slow))
    return Timings(rounds=rounds)


def rounds_for(seconds: float, rounds: int) -> int:
    """Rounds that a contender takes part in, whose call takes so long."""
    return rounds if seconds <= SLOW_CALL else max(1, min(rounds, int(SLOW_BUDGET / seconds)))


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values lie below, interpolated."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _slice(
    call: Callable[[int], object], counter: Iterator[int], length: float, seconds: float, clock: Callable[[], float]
) -> tuple[list[float], float | None]:
    """Seconds of each call in one slice, and what other processes used meanwhile."""
    taken: list[float] = []
    with no_garbage_collection():
        if seconds < length:  # threads and caches get used to this contender
            call(next(counter))
        watch = Others()
        start = clock()
        while not taken or clock() - start < length:
            i = next(counter)
            before = clock()
            call(i)
            taken.append(clock() - before)
    return taken, watch.share()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While it lasts, no pauses of Python's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Others:
    """Watches, from its making on, how much of a core everything but this process uses."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """Cores that others used, on average; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        own, elapsed = time.process_time() - self._own, time.perf_counter() - self._start
        return max(0.0, (busy - self._busy - own) / elapsed)


def _busy_seconds() -> float | None:
    """Seconds that all cores together were not idle, stolen time included, since the system started."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
    except OSError:
        return None  # not Linux
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
