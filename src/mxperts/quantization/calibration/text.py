"""The text that a model is calibrated on, as windows of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxperts import models
from mxperts.errors import ArgumentError

TOKENS = 65536
"""How many tokens a model is calibrated on, at most, unless told."""
CONTEXT = 2048
"""Tokens in a window, at most."""

MEMORY = 2 << 30
"""Bytes that quantising some experts at a time may take, about, unless told."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """On what a model is calibrated, and how it is run.

    Attributes:
        text: a text file, a folder of ``.txt`` files, or token ids: a list in a ``.json`` file, or one dimension of
            integers in a ``.npy`` file. None: for the model that comes with mxperts, a text that it was trained on.
        tokens: how many; default: ``TOKENS``, or all if there are fewer.
        context: tokens in a window; default: ``CONTEXT``, or as many as the model takes.
        seed: which windows are taken of a longer text.
        device: where the model's layers run and weights are quantised.
        backend: what runs quantised layers: "auto" or a backend's name.
        batch: tokens that run through a layer at a time; a window is never cut.
        memory: bytes that quantising a group of experts may take, about.
        trust_remote_code: allow Python code that comes with the model to run.
    """

    text: str | Path | None = None
    tokens: int | None = None
    context: int | None = None
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"
    batch: int = 4096
    memory: int = MEMORY
    trust_remote_code: bool = False


def windows(calibration: Calibration, model: Path, config: Any) -> Tensor:
    """The windows to run, int64 [windows, context].

    Args:
        calibration: what was asked for.
        model: folder of the checkpoint, with its tokenizer.
        config: its Transformers config.

    Raises:
        ArgumentError: no text where one is needed, one that cannot be read, ids that the model does not have, or fewer
            tokens than asked for or than one window has.
    """
    text = calibration.text
    if text is None:
        if not models.is_shipped(model):
            raise ArgumentError(
                f"calibrating {model} needs a text: name a file, a folder of .txt files, or token ids in .json or .npy"
            )
        text = models.calibration()
    text_config = config.get_text_config()
    ids = _ids(Path(text), model, calibration.trust_remote_code)
    if len(ids) and not 0 <= min(ids) <= max(ids) < text_config.vocab_size:
        raise ArgumentError(
            f"{text} has token ids from {min(ids)} to {max(ids)}; the model has 0 to {text_config.vocab_size - 1}"
        )
    wanted, limit = calibration.tokens, getattr(text_config, "max_position_embeddings", None) or 2**31
    for what, number in (("tokens", wanted), ("context", calibration.context)):
        if number is not None and number < 2:
            raise ArgumentError(f"{what} must be at least 2, not {number}")
    if calibration.context is not None and calibration.context > limit:
        raise ArgumentError(f"context is {calibration.context} tokens; the model takes {limit}")
    context = min(calibration.context or CONTEXT, limit, wanted or limit)
    needed = context if wanted is None else wanted
    if len(ids) < needed:
        raise ArgumentError(f"{text} has {len(ids)} tokens; {needed} are needed for calibration: take a longer text")
    whole = torch.tensor(ids, dtype=torch.int64).unfold(0, context, context)  # [all windows, context]
    count = min(len(whole), max(1, (TOKENS if wanted is None else wanted) // context))
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(calibration.seed))[:count]
    return whole[chosen.sort().values].contiguous()


def fingerprint(ids: Tensor) -> str:
    """By which the windows of an interrupted run are known again."""
    return hashlib.sha256(str(list(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def _ids(text: Path, model: Path, trust_remote_code: bool) -> Sequence[int]:
    try:
        if text.suffix == ".npy":
            return _checked(text, np.load(text, allow_pickle=False).tolist())
        if text.suffix == ".json":
            return _checked(text, json.loads(text.read_bytes()))
        files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
        if not files:
            raise ArgumentError(f"{text} is a folder without .txt files")
        whole = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except ArgumentError:
        raise
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot read the calibration text {text}: {error}") from error
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _checked(file: Path, ids: Any) -> Sequence[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ArgumentError(f"{file} must hold one list of token ids, integers")
    return ids
