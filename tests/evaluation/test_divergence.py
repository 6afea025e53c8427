import math

import pytest
import torch

from mxperts.evaluation.divergence import Divergence, TokenMetrics


def random_logits(seed: int, rows: int = 5, vocabulary: int = 7) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


TARGETS = torch.tensor([0, 3, 6, 2, 2])


def probabilities(row: list[float]) -> list[float]:
    """The definition of softmax, in Python's float64."""
    weights = [math.exp(x) for x in row]
    return [w / sum(weights) for w in weights]


def test_token_metrics_are_their_definitions():
    base, other = random_logits(1), random_logits(2)
    metrics = TokenMetrics.of(other, base, TARGETS)
    for i, target in enumerate(TARGETS.tolist()):
        p, q = probabilities(base[i].tolist()), probabilities(other[i].tolist())
        assert metrics.nll[i].item() == pytest.approx(-math.log(q[target]), abs=1e-6)
        assert metrics.base_nll[i].item() == pytest.approx(-math.log(p[target]), abs=1e-6)
        assert metrics.kl[i].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-6
        )
        assert metrics.delta_p[i].item() == pytest.approx(q[target] - p[target], abs=1e-6)
        assert metrics.same_top[i].item() == (p.index(max(p)) == q.index(max(q)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_logits_do_not_diverge_at_all(dtype):
    logits = random_logits(3).to(dtype)
    divergence = Divergence.of(TokenMetrics.of(logits, logits.clone(), TARGETS))
    assert divergence.kl.value == divergence.kl.stderr == 0.0
    assert {p.value for p in divergence.kl_percentiles.values()} == {0.0}
    assert divergence.kl_histogram.below == 5
    assert divergence.ln_ratio.value == divergence.delta_p.value == divergence.rms_delta_p.value == 0.0
    assert divergence.same_top.value == 1.0


def test_logits_that_differ_by_a_constant_are_the_same_distribution():
    logits = random_logits(4)
    metrics = TokenMetrics.of(logits + 2.0, logits, TARGETS)
    torch.testing.assert_close(metrics.kl, torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_kl_is_from_base_to_other():
    """KL(P || Q) of P = (3/4, 1/4) and Q = (1/2, 1/2) is 3/4 ln 3/2 + 1/4 ln 1/2."""
    base, other = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    metrics = TokenMetrics.of(other, base, torch.tensor([0]))
    assert metrics.kl.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_tokens_that_both_rule_out_do_not_count():
    base, other = random_logits(5), random_logits(6)
    base[:, 1] = other[:, 1] = -torch.inf
    kept = [0, 2, 3, 4, 5, 6]
    with_masked = TokenMetrics.of(other, base, torch.zeros(5, dtype=torch.int64))
    without = TokenMetrics.of(other[:, kept], base[:, kept], torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(with_masked.kl, without.kl)


def test_a_model_that_gives_nan_is_reported_as_nan():
    base, other = random_logits(7), random_logits(8)
    other[2, 0] = torch.nan
    divergence = Divergence.of(TokenMetrics.of(other, base, TARGETS))
    assert math.isnan(divergence.kl.value)
    assert math.isnan(divergence.ln_ratio.value)


def test_aggregates():
    metrics = TokenMetrics.of(random_logits(1), random_logits(2), TARGETS)
    divergence = Divergence.of(metrics)
    kl = sorted(metrics.kl.tolist())
    assert divergence.kl.value == pytest.approx(sum(kl) / 5)
    assert divergence.kl_percentiles[50.0].value == kl[2]
    assert divergence.kl_percentiles[100.0].value == kl[4]
    # Linear interpolation: 90 % of the way through four gaps is 0.6 of the way from the fourth to the fifth.
    assert divergence.kl_percentiles[90.0].value == pytest.approx(kl[3] + 0.6 * (kl[4] - kl[3]))
    assert divergence.ln_ratio.value == pytest.approx((metrics.nll - metrics.base_nll).mean().item())
