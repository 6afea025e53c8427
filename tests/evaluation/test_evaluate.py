import copy
import math
import sys

import pytest
import torch

from mxperts.errors import ArgumentError
from mxperts.evaluation import Windows, evaluate, evaluate_base
from mxperts.evaluation.logits import LogitStore
from mxperts.evaluation.router import experts_modules


def by_hand(model, windows: Windows) -> list[list[float]]:
    """Log-probabilities of every scored position, one window at a time, in float64."""
    rows = []
    for ids in windows.ids:
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0]
        rows += torch.log_softmax(logits.double(), -1)[windows.first_scored - 1 : -1].tolist()
    return rows


def test_perplexity_is_its_definition(base_model, windows):
    evaluation, _ = evaluate_base(base_model, windows, batch_size=3)
    targets = windows.ids[:, 1:].flatten().tolist()
    nll = [-row[t] for row, t in zip(by_hand(base_model, windows), targets, strict=True)]
    assert evaluation.tokens == len(nll) == 8 * 23
    # Windows run in batches may be rounded otherwise than alone: bf16 logits differ by up to one part in 256.
    assert evaluation.perplexity.value == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-2)
    assert evaluation.divergence is None
    assert evaluation.router_agreement is None


def test_a_model_does_not_diverge_from_itself(base_model, windows):
    first, base = evaluate_base(base_model, windows)
    again = evaluate(base_model, windows, base)
    assert again.perplexity == first.perplexity
    assert again.divergence.kl.value == again.divergence.kl.stderr == 0.0
    assert again.divergence.same_top.value == 1.0
    assert again.router_agreement == dict.fromkeys(experts_modules(base_model), 1.0)
    assert again.mean_router_agreement == 1.0


def test_divergence_is_its_definition(base_model, other_model, windows):
    _, base = evaluate_base(base_model, windows, batch_size=1)
    evaluation = evaluate(other_model, windows, base, batch_size=1)
    p_rows, q_rows = by_hand(base_model, windows), by_hand(other_model, windows)
    kl = [
        sum(math.exp(p) * (p - q) for p, q in zip(ps, qs, strict=True)) for ps, qs in zip(p_rows, q_rows, strict=True)
    ]
    assert evaluation.divergence.kl.value == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert evaluation.divergence.kl_percentiles[100.0].value == pytest.approx(max(kl), rel=1e-4)
    assert 0 < evaluation.mean_router_agreement < 1


def test_overlapping_windows(base_model, other_model, windows):
    overlapping = Windows.of(windows.ids.flatten().tolist(), context=24, stride=12)
    _, base = evaluate_base(base_model, overlapping)
    assert evaluate(other_model, overlapping, base).tokens == 15 * 12


def test_sizes(base_model, windows):
    evaluation, base = evaluate_base(base_model, windows)
    assert evaluation.size.experts == 2 * 8 * (2 * 32 * 64 + 64 * 32) * 2  # layers, experts, values, bytes
    assert evaluation.expert_bits == 16.0
    assert evaluation.model_bits == pytest.approx(16.0, abs=0.1)  # the rotary frequencies are float32
    assert base.values.experts == evaluation.size.experts // 2


def test_logits_beyond_the_limit_go_to_a_file_and_come_back_exactly():
    logits = torch.randn(6, 5).to(torch.bfloat16)
    store = LogitStore(6, 5, torch.bfloat16, memory_limit=10)
    assert not store.in_memory
    store.keep(slice(0, 4), logits[:4], torch.zeros(4, dtype=torch.int64))
    store.keep(slice(4, 6), logits[4:], torch.zeros(2, dtype=torch.int64))
    assert torch.equal(store.logits, logits)
    assert LogitStore(6, 5, torch.bfloat16).in_memory


def test_other_windows_are_refused(base_model, windows):
    _, base = evaluate_base(base_model, windows)
    with pytest.raises(ArgumentError, match="another text"):
        evaluate(base_model, Windows.of(range(50), context=24), base)


def test_another_vocabulary_is_refused(base_model, make_model, windows):
    _, base = evaluate_base(base_model, windows)
    with pytest.raises(ArgumentError, match="vocabulary of 97 tokens but other of 101"):
        evaluate(make_model(vocab_size=101), windows, base, name="other")


def test_other_layers_are_refused(base_model, make_model, windows):
    _, base = evaluate_base(base_model, windows)
    with pytest.raises(ArgumentError, match="same MoE layers"):
        evaluate(make_model(num_hidden_layers=1), windows, base)


def test_training_mode_is_refused(base_model, windows):
    with pytest.raises(ArgumentError, match="training mode"):
        evaluate_base(copy.deepcopy(base_model).train(), windows)


def test_tokens_of_experts_are_counted(base_model, windows):
    evaluation, base = evaluate_base(base_model, windows)
    for name, index in base.choices.items():
        assert evaluation.load[name] == [(index == expert).sum().item() for expert in range(8)]
    never = {name: [e for e, tokens in enumerate(load) if not tokens] for name, load in evaluation.load.items()}
    assert evaluation.dead_experts == {name: experts for name, experts in never.items() if experts}


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_that_says_where(base_model, windows, number):
    def damage(module, args, kwargs, output):
        row = (kwargs["input_ids"] == windows.ids[5]).all(-1)
        output.logits[row, 17, 3] = number

    _, base = evaluate_base(base_model, windows)
    model = copy.deepcopy(base_model)
    model.register_forward_hook(damage, with_kwargs=True)
    message = "broken: its logits are NaN or infinite in window 5 after position 17"
    with pytest.raises(ArgumentError, match=message):
        evaluate_base(model, windows, name="broken", batch_size=2)
    with pytest.raises(ArgumentError, match=message):
        evaluate(model, windows, base, name="broken")


def test_what_is_compared_at_a_time_does_not_matter(base_model, other_model, windows, monkeypatch):
    whole = evaluate(other_model, windows, evaluate_base(base_model, windows)[1])
    monkeypatch.setattr(sys.modules[evaluate.__module__], "_CHUNK", 97 * 5)
    few = evaluate(other_model, windows, evaluate_base(base_model, windows)[1])
    assert (few.divergence.kl, few.worst, few.perplexity) == (whole.divergence.kl, whole.worst, whole.perplexity)
