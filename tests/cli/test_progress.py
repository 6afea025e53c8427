from __future__ import annotations

import pytest

from mxperts.cli.progress import Progress


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 1.0, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress()
    for done in (0, 10**9, 5 * 10**9):
        progress(done, 10**10)
    assert capsys.readouterr().err == "5.00 of 10.00 GB, about 10 s left\n"


def test_another_step_of_the_work_is_timed_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 100.0, 100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress()
    for done, total in ((0, 10**9), (10**9, 10**9), (0, 10**10), (5 * 10**9, 10**10)):
        progress(done, total)
    assert capsys.readouterr().err.splitlines()[-1] == "5.00 of 10.00 GB, about 10 s left"
