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
