import pytest
import torch

from mxperts.evaluation import Windows, evaluate, evaluate_base
from mxperts.evaluation.divergence import TokenMetrics


def named(ids) -> str:
    return "".join(f"<{i}>" for i in ids)


@pytest.fixture(scope="module")
def evaluated(base_model, other_model, windows):
    named_windows = Windows.of(windows.ids.flatten().tolist(), context=24, decode=named)
    _, base = evaluate_base(base_model, named_windows, batch_size=3)
    return evaluate(other_model, named_windows, base, batch_size=3)


def answers(model, windows) -> torch.Tensor:
    """The logits of every scored token, [windows, context - 1, vocabulary], in the same batches."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in windows.batches(3)])


def test_they_are_those_of_the_largest_divergence(evaluated, base_model, other_model, windows):
    base, other = answers(base_model, windows), answers(other_model, windows)
    targets = windows.ids[:, 1:].flatten()
    metrics = TokenMetrics.of(other.flatten(0, 1), base.flatten(0, 1), targets)
    assert [w.kl for w in evaluated.worst] == metrics.kl.topk(10).values.tolist()
    assert evaluated.worst[0].kl == evaluated.divergence.kl_percentiles[100.0].value
    for w in evaluated.worst:
        ids = windows.ids[w.window].tolist()
        assert (w.token, w.text) == (ids[w.position], named([ids[w.position]]))
        assert (w.before, w.after) == (named(ids[: w.position]), named(ids[w.position + 1 :][:12]))
        for logits, probability, predictions in (
            (base, w.base_probability, w.base_predictions),
            (other, w.probability, w.predictions),
        ):
            expected = torch.softmax(logits[w.window, w.position - 1].double(), -1)
            assert probability == pytest.approx(expected[w.token].item(), rel=1e-5)
            assert [p.probability for p in predictions] == pytest.approx(expected.topk(5).values.tolist(), rel=1e-5)
            assert all(p.text == named([p.token]) for p in predictions)


def test_positions_count_from_the_start_of_overlapping_windows(base_model, other_model, windows):
    overlapping = Windows.of(windows.ids.flatten().tolist(), context=24, stride=12)
    _, base = evaluate_base(base_model, overlapping)
    for w in evaluate(other_model, overlapping, base).worst:
        assert 12 <= w.position < 24
        assert w.token == overlapping.ids[w.window, w.position]
        assert w.text == f"[{w.token}]"  # no tokenizer is known


def test_a_model_that_does_not_differ_has_none(base_model, windows):
    first, base = evaluate_base(base_model, windows)
    assert first.worst == ()
    assert evaluate(base_model, windows, base).worst == []
