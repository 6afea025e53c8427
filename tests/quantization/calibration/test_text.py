"""The calibration text: where it comes from, which windows of it are taken, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mxperts import models
from mxperts.errors import ArgumentError
from mxperts.quantization.calibration import Calibration
from mxperts.quantization.calibration.text import CONTEXT, fingerprint, windows


def config(vocabulary: int = 100, context: int | None = None) -> Any:
    text = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=context)
    return SimpleNamespace(get_text_config=lambda: text)


def write_ids(folder: Path, count: int) -> Path:
    (folder / "ids.json").write_text(json.dumps([i % 100 for i in range(count)]))
    return folder / "ids.json"


def test_all_windows_of_a_short_text(tmp_path: Path) -> None:
    found = windows(Calibration(text=write_ids(tmp_path, 35), context=10), tmp_path, config())
    assert torch.equal(found, torch.arange(30).reshape(3, 10))


def test_a_seed_chooses_windows_of_a_longer_text(tmp_path: Path) -> None:
    text = write_ids(tmp_path, 100)
    found = [
        windows(Calibration(text=text, context=10, tokens=30, seed=seed), tmp_path, config()) for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    for chosen in found:
        starts = chosen[:, 0].tolist()
        assert sorted(set(starts)) == starts
        assert all(start % 10 == 0 for start in starts)
        assert torch.equal(chosen, torch.tensor(starts)[:, None] + torch.arange(10))
    assert fingerprint(found[0]) == fingerprint(found[1]) != fingerprint(found[2])


def test_the_same_ids_from_json_and_numpy(tmp_path: Path) -> None:
    text = write_ids(tmp_path, 64)
    np.save(tmp_path / "ids.npy", np.array(json.loads(text.read_text()), dtype=np.uint16))
    found = [windows(Calibration(text=t, context=16), tmp_path, config()) for t in (text, tmp_path / "ids.npy")]
    assert torch.equal(*found)


def test_a_folder_of_texts_and_the_default(tmp_path: Path) -> None:
    from transformers import AutoConfig

    shipped = models.shipped()
    found = windows(Calibration(tokens=512), shipped, AutoConfig.from_pretrained(shipped))
    assert found.shape == (2, 256)
    whole = models.calibration().read_text(encoding="utf-8")
    first, second = whole.split("\n", 400)[:400], whole.split("\n")[400:]  # texts are joined by a line break
    (tmp_path / "b.txt").write_text("\n".join(second), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n".join(first), encoding="utf-8")
    (tmp_path / "c.md").write_text("not a text", encoding="utf-8")
    again = windows(Calibration(text=tmp_path, tokens=512), shipped, AutoConfig.from_pretrained(shipped))
    assert torch.equal(again, found)


def test_windows_are_as_long_as_the_model_takes(tmp_path: Path) -> None:
    text = write_ids(tmp_path, 3 * CONTEXT)
    assert windows(Calibration(text=text), tmp_path, config()).shape == (3, CONTEXT)
    assert windows(Calibration(text=text), tmp_path, config(context=1024)).shape == (6, 1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 11}, "has 10 tokens; 11 are needed"),
        ({"tokens": 11}, "has 10 tokens; 11 are needed"),
        ({}, f"has 10 tokens; {CONTEXT} are needed for calibration: take a longer text"),
        ({"tokens": 1}, "tokens must be at least 2, not 1"),
        ({"context": 0}, "context must be at least 2, not 0"),
    ],
)
def test_too_short(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        windows(Calibration(text=write_ids(tmp_path, 10), **options), tmp_path, config())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.json", b'{"ids": [1]}', "must hold one list of token ids"),
        ("ids.json", b"[1, 2.5]", "must hold one list of token ids"),
        ("ids.json", b"[1, true]", "must hold one list of token ids"),
        ("ids.json", b"[1, 2", "cannot read the calibration text"),
        ("ids.json", b"[1, 100]", "token ids from 1 to 100; the model has 0 to 99"),
        ("ids.json", b"[-1, 5]", "token ids from -1 to 5"),
        ("ids.npy", b"no array", "cannot read the calibration text"),
        ("text.txt", b"\xff\xfe\xff", "cannot read the calibration text"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=message):
        windows(Calibration(text=tmp_path / name, context=2), tmp_path, config())


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot read the calibration text"):
        windows(Calibration(text=tmp_path / "no.txt"), tmp_path, config())
    with pytest.raises(ArgumentError, match=r"is a folder without \.txt files"):
        windows(Calibration(text=tmp_path), tmp_path, config())
    with pytest.raises(ArgumentError, match=r"needs a text: name a file, a folder of \.txt files, or token ids"):
        windows(Calibration(), tmp_path, config())
    with pytest.raises(ArgumentError, match="context is 20 tokens; the model takes 16"):
        windows(Calibration(text=write_ids(tmp_path, 100), context=20), tmp_path, config(context=16))


def test_numpy_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ArgumentError, match="cannot read the calibration text"):
        windows(Calibration(text=tmp_path / "ids.npy"), tmp_path, config())
