"""training/train_source_code.py: the split of the text, and a whole training in small."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "training"
SIZES = "vocab-size 300 hidden-size 32 layers 2 heads 2 kv-heads 1 head-dim 16 experts 4 experts-per-token 2"
SIZES += " moe-intermediate-size 32 context 32 batch-size 2"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import train_source_code

    return train_source_code


@pytest.fixture
def library(tmp_path):
    """400 programs, some of them copies, and what is none."""
    words, rng = [f"name_{i}" for i in range(200)], random.Random(0)
    folder = tmp_path / "lib"
    for i in range(400):
        file = folder / f"package_{i % 7}" / f"module_{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{rng.choice(words)} = {rng.choice(words)}({rng.choice(words)}, {rng.random()})" for _ in range(12)]
        file.write_text("\n".join(lines), encoding="utf-8")
    (folder / "copy.py").write_bytes(file.read_bytes())
    (folder / "latin.py").write_bytes(b"caf\xe9 " * 100)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("x = 1\n" * 100)
    return folder


def test_every_file_has_one_use_that_its_name_decides(script, library):
    files = script.read_files([library], 10**6)
    assert len(files) == 400  # no copy, nothing that is no UTF-8, no packages inside the library
    split = script.split_files(files)
    assert {file.name for part in vars(split).values() for file in part} == {file.name for file in files}
    assert 0 < len(split.held_out) < 40
    half = script.read_files([library], sum(len(file.text) for file in files) // 2)
    assert {file.name for file in half} < {file.name for file in files}
    names = {file.name for file in split.held_out}
    assert {file.name for file in script.split_files(half).held_out} == names & {file.name for file in half}
    assert script.fingerprint(files) == script.fingerprint(files[::-1]) != script.fingerprint(half)


def test_copies_of_what_is_trained_on_are_not_held_out(script):
    line = "the_same_statement_in_two_of_the_files = 1\n"
    own = script.File("a.py", "".join(f"statement_number_{i}_of_a_file_of_its_own = {i}\n" for i in range(20)))
    copy = script.File("b.py", own.text + line * 20)
    assert script.original([own, copy], [script.File("c.py", line)]) == [own]


def test_a_training_that_breaks_off_leaves_a_model(script, library, tmp_path, monkeypatch):
    steps = 0

    def training_step(*args):
        nonlocal steps
        steps += 1
        if steps > 9:
            raise RuntimeError("the device is gone")
        return real(*args)

    real = script.training_step
    monkeypatch.setattr(script, "training_step", training_step)
    out = tmp_path / "model"
    sizes = [word if i % 2 else f"--{word}" for i, word in enumerate(SIZES.split())]
    arguments = ["--out", str(out), "--folders", str(library), "--steps", "12", "--evaluations", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_source_code.py", *arguments, *sizes])
    script.main()
    record = json.loads((out / "training.json").read_text())
    assert record["ended_early"] == "RuntimeError: the device is gone"
    assert record["run"]["best_step"] == 6
    assert record["figures"]["held_out"]["perplexity_per_token"] > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    text = (out / "heldout.txt").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.inference_mode():
        assert model(ids[:, :32]).logits.isfinite().all()
