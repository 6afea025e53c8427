import dataclasses
import json
import struct

import pytest

from mxperts.errors import ArgumentError, CheckpointError
from mxperts.evaluation import BaseFile, Windows, environment, evaluate, evaluate_base


@pytest.fixture
def file(tmp_path) -> BaseFile:
    return BaseFile(path=tmp_path / "base.safetensors", model="digest", dtype="bfloat16")


def without_speed(evaluation) -> dict:
    found = dataclasses.asdict(evaluation)
    return {name: value for name, value in found.items() if name not in ("seconds", "tokens_per_second")}


@pytest.mark.parametrize("top_k", [0, 16, 1000])
def test_a_stored_base_compares_as_the_one_that_was_run(file, base_model, other_model, windows, top_k):
    first, base = evaluate_base(base_model, windows, name="bf16", top_k=top_k)
    file.save(first, base, windows)
    loaded, again = file.load(windows, name="bf16")
    assert without_speed(loaded) == without_speed(first)
    assert loaded.seconds is loaded.tokens_per_second is None
    assert again.environment["versions"] == environment()["versions"]
    assert base.environment is None
    found, expected = (evaluate(other_model, windows, b, name="other") for b in (again, base))
    assert repr(without_speed(found)) == repr(without_speed(expected))  # repr: the errors of extremes are NaN


def test_all_tokens_kept_are_the_whole_distribution(base_model, other_model, windows):
    whole, top = (evaluate_base(base_model, windows, top_k=k)[1] for k in (0, 97))
    found, expected = (evaluate(other_model, windows, base) for base in (top, whole))
    assert found.divergence.kl.value == pytest.approx(expected.divergence.kl.value, rel=1e-12)
    assert found.divergence.delta_p == expected.divergence.delta_p
    assert found.perplexity == expected.perplexity
    assert [w.base_predictions for w in found.worst] == [w.base_predictions for w in expected.worst]


def test_the_same_base_gives_the_same_bytes(file, base_model, windows):
    written = []
    for _ in range(2):
        file.save(*evaluate_base(base_model, windows, top_k=8), windows)
        written.append(file.path.read_bytes())
    assert written[0] == written[1]
    assert [p.name for p in file.path.parent.iterdir()] == ["base.safetensors"]


def test_it_is_small_and_says_how_much_is_left_out(file, base_model, windows):
    first, base = evaluate_base(base_model, windows, top_k=8)
    file.save(first, base, windows)
    header_size = struct.unpack("<Q", file.path.read_bytes()[:8])[0]
    header = json.loads(file.path.read_bytes()[8 : 8 + header_size])
    about = json.loads(header["__metadata__"]["mxperts_base"])
    assert about["rest_mass"] == [base.answers.rest.mean().item(), base.answers.rest.max().item()]
    assert 0 < about["rest_mass"][0] < about["rest_mass"][1] < 1
    tokens, layers = windows.ids.numel(), 2
    # ids and log-probabilities of 8 tokens, rest and target, the first; two experts a layer
    assert file.path.stat().st_size == 8 + header_size + windows.scored * (8 * 8 + 8 + 8 + 4) + tokens * layers * 2 * 2


def test_there_may_be_no_file(file, windows):
    assert file.load(windows) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another"}, "answers of another model"),
        ({"dtype": "float32"}, "at dtype bfloat16, not float32"),
        ({"top_k": 9}, "holds the 8 most likely tokens, not 9"),
        ({"top_k": 0}, "holds the 8 most likely tokens, not all"),
    ],
)
def test_another_base_is_refused(file, base_model, windows, changes, message):
    file.save(*evaluate_base(base_model, windows, top_k=8), windows)
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(file, **changes).load(windows)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda ids: Windows.of([*ids[:-1], (ids[-1] + 1) % 97], context=24),
            "another text, amount of it, or tokenizer",
        ),
        (lambda ids: Windows.of(ids[:-24], context=24), "another text, amount of it, or tokenizer"),
        (lambda ids: Windows.of(ids, context=12), "at context 24, not 12"),
        (lambda ids: Windows.of(ids, context=24, stride=12), "at stride 24, not 12"),
    ],
)
def test_another_text_is_refused(file, base_model, windows, other, message):
    file.save(*evaluate_base(base_model, windows, top_k=8), windows)
    with pytest.raises(ArgumentError, match=message):
        file.load(other(windows.ids.flatten().tolist()))


def test_what_is_no_such_file_is_refused(file, base_model, windows):
    from safetensors.torch import save_file

    save_file({"x": windows.ids}, file.path)
    with pytest.raises(ArgumentError, match="does not hold a base's answers"):
        file.load(windows)
    file.save(*evaluate_base(base_model, windows, top_k=8), windows)
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        file.load(windows)


def test_a_negative_number_of_tokens_is_refused(base_model, windows):
    with pytest.raises(ArgumentError, match="top_k must be"):
        evaluate_base(base_model, windows, top_k=-1)
