"""What the tests of the CPU backend share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxperts.backend.cpu.paths import PATHS, use_path


@pytest.fixture
def forced(path: str) -> Iterator[None]:
    """Everything on the path that the test is parametrised with; skips where this CPU does not have it."""
    (missing,) = (p.missing() for p in PATHS if p.name == path)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    with use_path(path):
        yield


@pytest.fixture
def in_new_process(tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    """Runs a script with some environment variables: the JSON that it prints last, and the warnings that it logs."""

    def run(script: str, **variables: str | Path) -> tuple[Any, list[str]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        start = f"import logging\nlogging.basicConfig(filename={str(log)!r}, level=logging.WARNING)\n"
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            [sys.executable, "-c", start + script], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), [w for w in log.read_text().splitlines() if ":mxperts:" in w]

    return run
