"""Timing of an accelerator, with a clock that tests set."""

import pytest

from mxperts.benchmark.device import replay
from mxperts.benchmark.device.replay import MAX_PASSES, MAX_REPLAYS, Replay, eager_seconds, one_by_one, record, slice_of


class Gpu:
    """Every call takes so many seconds on it; graphs of more than ``room`` calls cannot be recorded."""

    def __init__(self, seconds: float, room: int = 10**6) -> None:
        self.seconds, self.room = seconds, room
        self.now, self.log, self.recorded = 0.0, [], []

    def run(self, i):
        self.now += self.seconds
        self.log.append(i)

    def recorder(self, run, calls):
        self.recorded.append(calls)
        if calls > self.room:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return one_by_one(run, calls)

    def stopwatch(self, go, times):
        taken = []
        for _ in range(times):
            before = self.now
            go()
            taken.append(self.now - before)
        return taken


def test_short_calls_are_recorded_several_times_over():
    gpu = Gpu(seconds=2**-13)  # 122 us
    found = record(gpu.run, 4, gpu.recorder, gpu.stopwatch)
    assert gpu.recorded == [4, 12]
    assert found.calls == 12
    assert found.seconds == 12 * 2**-13 >= replay.MIN_REPLAY
    assert found.why_not == ""
    assert gpu.log[-12:] == list(range(12))  # all routings in turn


def test_long_calls_are_recorded_once_and_very_short_ones_not_for_ever():
    gpu = Gpu(seconds=0.5)
    assert record(gpu.run, 2, gpu.recorder, gpu.stopwatch).calls == 2
    assert gpu.recorded == [2]
    gpu = Gpu(seconds=2**-30)
    assert record(gpu.run, 1, gpu.recorder, gpu.stopwatch).calls == MAX_PASSES


@pytest.mark.parametrize("room", [0, 4])
def test_what_cannot_be_recorded_is_called_one_by_one_and_says_why(room):
    gpu = Gpu(seconds=2**-13, room=room)
    found = record(gpu.run, 4, gpu.recorder, gpu.stopwatch)
    assert found.calls == 4
    assert found.seconds == 4 * 2**-13
    assert found.why_not == "RuntimeError: operation not permitted when stream is capturing"


def test_samples_are_means_of_the_calls_of_a_replay():
    gpu = Gpu(seconds=2**-13)
    found = Replay(go=one_by_one(gpu.run, 8), calls=8, seconds=2**-10)
    samples, others = slice_of(found, 2**-6, gpu.stopwatch)()
    assert samples == [2**-13] * 16
    assert others is None
    assert len(gpu.log) == 17 * 8  # the first replay of a slice is not timed


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 1), (1e-6, MAX_REPLAYS)])
def test_a_slice_has_at_least_one_replay_and_not_too_many(seconds, count):
    gpu = Gpu(seconds=seconds)
    samples, _ = slice_of(Replay(go=one_by_one(gpu.run, 1), calls=1, seconds=seconds), 0.02, gpu.stopwatch)()
    assert len(samples) == count


def test_eager_calls_are_timed_in_a_row():
    gpu = Gpu(seconds=0.25)
    assert eager_seconds(gpu.run, 4, gpu.stopwatch) == 0.25
    assert gpu.log[:5] == [0, 1, 2, 3, 0]
