import itertools
import math

import pytest
import torch

from mxperts.evaluation.divergence import TokenMetrics
from mxperts.evaluation.top_k import TopStore

VOCABULARY = 23
TARGETS = torch.tensor([0, 22, 6, 2, 2, 9])
ROWS = slice(0, len(TARGETS))


def random_logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(len(TARGETS), VOCABULARY, generator=generator) * 3).to(dtype)


def stored(logits: torch.Tensor, k: int) -> TopStore:
    """Filled in two parts, as a model runs."""
    store = TopStore.empty(len(logits), VOCABULARY, k)
    for rows in (slice(0, 2), slice(2, len(logits))):
        store.keep(rows, logits[rows], TARGETS[rows])
    return store


def probabilities(row: list[float]) -> list[float]:
    """The definition of softmax, in Python's float64."""
    weights = [math.exp(x) for x in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY + 5])
def test_with_the_whole_vocabulary_all_metrics_are_exact(dtype, k):
    base, other = random_logits(1, dtype), random_logits(2, dtype)
    found, expected = stored(base, k).compare(ROWS, other, TARGETS), TokenMetrics.of(other, base, TARGETS)
    for name in ("nll", "base_nll", "delta_p", "same_top"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    # the same float32 products summed in float64 in another order
    torch.testing.assert_close(found.kl, expected.kl, atol=1e-14, rtol=0)


@pytest.mark.parametrize("k", [1, 5, 22])
def test_divergence_of_a_few_tokens_and_the_rest_is_its_definition(k):
    base, other = random_logits(3), random_logits(4)
    metrics = stored(base, k).compare(ROWS, other, TARGETS)
    for i in range(len(TARGETS)):
        p, q = probabilities(base[i].tolist()), probabilities(other[i].tolist())
        top = sorted(range(VOCABULARY), key=lambda t: -p[t])[:k]
        rest_p, rest_q = (sum(x for t, x in enumerate(d) if t not in top) for d in (p, q))
        expected = sum(p[t] * math.log(p[t] / q[t]) for t in top) + rest_p * math.log(rest_p / rest_q)
        assert metrics.kl[i].item() == pytest.approx(expected, abs=1e-6)
        assert metrics.nll[i].item() == pytest.approx(-math.log(q[TARGETS[i]]), abs=1e-6)
        assert metrics.base_nll[i].item() == pytest.approx(-math.log(p[TARGETS[i]]), abs=1e-6)
        assert metrics.same_top[i].item() == (p.index(max(p)) == q.index(max(q)))


def test_more_tokens_come_nearer_from_below():
    base, other = random_logits(5), random_logits(6)
    divergences = [stored(base, k).compare(ROWS, other, TARGETS).kl for k in range(1, VOCABULARY + 1)]
    for fewer, more in itertools.pairwise(divergences):
        assert (fewer <= more + 1e-7).all()
    assert (divergences[0] < divergences[-1]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_equal_logits_do_not_diverge_at_all(dtype, k):
    logits = random_logits(7, dtype)
    logits[:, 5] = logits[:, 11] = logits.amax(-1)  # which of equals is first must not matter
    metrics = stored(logits, k).compare(ROWS, logits.clone(), TARGETS)
    assert metrics.kl.tolist() == metrics.delta_p.tolist() == [0.0] * len(TARGETS)
    assert metrics.same_top.all()


def test_tokens_that_the_base_rules_out_do_not_count():
    base, other = random_logits(8), random_logits(9)
    base[:, 1:] = -torch.inf
    metrics = stored(base, 3).compare(ROWS, other, torch.zeros_like(TARGETS))
    torch.testing.assert_close(metrics.kl, metrics.nll)  # P is 1 for token 0


def test_the_most_likely_come_first_and_equals_by_number():
    logits = torch.zeros(len(TARGETS), VOCABULARY)
    logits[:, 7] = logits[:, 3] = 1.0
    store = stored(logits, 2)
    assert store.ids.tolist() == [[3, 7]] * len(TARGETS)
    (first, p), (second, q) = store.most_likely(4, 5)
    assert (first, second, p) == (3, 7, q)
    assert p == pytest.approx(math.e / (2 * math.e + VOCABULARY - 2))
    assert store.rest.tolist() == pytest.approx([1 - 2 * p] * len(TARGETS))
