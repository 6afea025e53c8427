"""What the tests of the GPU backend share: without a CUDA device its kernels run under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the modules of kernels are imported

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # kernels are written in Triton


@pytest.fixture
def device() -> str:
    """Where the kernels under test run."""
    return "cuda" if torch.cuda.is_available() else "cpu"
