from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent.parent / "fixtures" / "checkpoints"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the checkpoints that other software exported."""
    return FIXTURES


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of them to where it may be damaged."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return make


@pytest.fixture(scope="session")
def quantization_config() -> Callable[[str], dict]:
    """A fresh copy of a checkpoint's ``quantization_config``."""
    return lambda name: json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]
