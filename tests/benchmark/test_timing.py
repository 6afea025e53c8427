import itertools

import pytest

from mxperts.benchmark import timing
from mxperts.benchmark.timing import Plan, Round, Timings, interleave, percentile, rounds_for


class Clock:
    """Time that passes only in calls."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds, log, name):
        def run(i):
            self.now += seconds
            log.append((name, i))

        return run


@pytest.fixture
def others(monkeypatch):
    """Shares of a core that others use, in the order in which they are asked for; then none."""
    shares = []

    class Scripted:
        def share(self):
            return shares.pop(0) if shares else 0.0

    monkeypatch.setattr(timing, "Others", Scripted)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    return shares


def run(plan, seconds, clock=None):
    clock, log = clock or Clock(), []
    calls = {name: clock.call(s, log, name) for name, s in seconds.items()}
    return interleave(calls, plan, seconds, clock=clock), log


def test_contenders_take_turns_and_each_round_begins_with_another(others):
    timings, log = run(Plan(rounds=3, slice=0.125, time_budget=100), {"a": 0.0625, "b": 0.03125})
    assert len(timings.rounds) == 3
    assert [name for name, _ in itertools.groupby(name for name, _ in log)] == ["a", "b", "a", "b"]
    assert timings.seconds("a") == [0.0625] * 6
    assert timings.seconds("b") == [0.03125] * 12
    # the first call of a slice is not timed, and calls go on counting from slice to slice
    assert [i for name, i in log if name == "a"] == list(range(2, 2 + 9))


def test_ratio_is_of_the_same_rounds():
    rounds = [
        Round(samples={"stream": [1.0], "a": [2.0]}, disturbed=frozenset(), quiet=True),
        Round(samples={"stream": [3.0], "a": [3.0]}, disturbed=frozenset(), quiet=True),
        Round(samples={"stream": [9.0], "a": [1.0]}, disturbed=frozenset({"a"}), quiet=False),
    ]
    assert Timings(rounds=rounds).ratio("stream", "a") == 0.75


def test_slow_contenders_take_part_in_the_first_rounds_only(others):
    timings, _ = run(Plan(rounds=4, slice=0.125, time_budget=100), {"slow": 2.0, "fast": 0.0625})
    assert timings.seconds("slow") == [2.0]
    assert len(timings.of("fast")) == 4


def test_rounds_of_slow_contenders():
    assert [rounds_for(seconds, 7) for seconds in (0.01, 0.5, 1.0, 1.4, 60.0)] == [7, 7, 3, 2, 1]


def test_disturbed_slices_are_taken_again(others):
    others += [0.5, 0.5]
    timings, log = run(Plan(rounds=1, slice=0.125, time_budget=100), {"a": 0.0625})
    assert timings.seconds("a") == [0.0625] * 2
    assert len(log) == 9
    assert not timings.disturbed("a")


def test_rounds_that_stay_disturbed_do_not_count(others):
    others += [0.5] * timing.ATTEMPTS
    timings, _ = run(Plan(rounds=2, slice=0.125, time_budget=100), {"a": 0.0625})
    assert [r.quiet for r in timings.rounds] == [False, True, True]
    assert len(timings.of("a")) == 2


def test_without_a_quiet_round_disturbed_ones_count_and_say_so(others):
    others += [0.5] * 1000
    timings, _ = run(Plan(rounds=2, slice=0.125, time_budget=1), {"a": 0.0625})
    assert timings.disturbed("a")
    assert timings.seconds("a")


def test_a_disturbed_slow_contender_spoils_no_round(others):
    others += [0.5]
    timings, _ = run(Plan(rounds=2, slice=0.125, time_budget=100), {"slow": 5.0, "fast": 0.0625})
    assert timings.disturbed("slow")
    assert not timings.disturbed("fast")
    assert len(timings.of("fast")) == 2


def test_the_time_budget_ends_it(others):
    timings, _ = run(Plan(rounds=50, slice=0.125, time_budget=0.35), {"a": 0.1})
    assert 1 < len(timings.rounds) < 6


def test_percentiles_are_interpolated():
    assert [percentile([4, 1, 3, 2], share) for share in (0, 0.5, 1)] == [1, 2.5, 4]
    assert percentile([7.0], 0.2) == 7.0


def test_others_are_seen_where_the_system_tells():
    share = timing.Others().share()
    assert share is None or share >= 0
