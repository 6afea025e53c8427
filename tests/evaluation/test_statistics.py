import math
import statistics

import pytest
import torch

from mxperts.evaluation.statistics import Histogram, mean, percentile, perplexity, root_mean_square, share

SAMPLES = [0.3, 1.7, -0.4, 2.2, 0.9]


def samples() -> torch.Tensor:
    return torch.tensor(SAMPLES, dtype=torch.float64)


def test_standard_error_of_the_mean_is_by_definition():
    estimate = mean(samples())
    assert estimate.value == pytest.approx(statistics.mean(SAMPLES))
    assert estimate.stderr == pytest.approx(statistics.stdev(SAMPLES) / math.sqrt(5))


def test_one_sample_has_no_standard_error():
    assert math.isnan(mean(torch.ones(1, dtype=torch.float64)).stderr)


def test_perplexity_propagates_the_error_of_the_mean():
    value = math.exp(statistics.mean(SAMPLES))
    estimate = perplexity(samples())
    assert estimate.value == pytest.approx(value)
    assert estimate.stderr == pytest.approx(value * statistics.stdev(SAMPLES) / math.sqrt(5))


def test_perplexity_beyond_float64_is_infinite():
    assert perplexity(torch.full((3,), 800.0, dtype=torch.float64)).value == math.inf


def test_root_mean_square_by_the_delta_method():
    squares = [x * x for x in SAMPLES]
    value = math.sqrt(statistics.mean(squares))
    estimate = root_mean_square(samples())
    assert estimate.value == pytest.approx(value)
    # d sqrt(m) = dm / (2 sqrt(m))
    assert estimate.stderr == pytest.approx(statistics.stdev(squares) / math.sqrt(5) / (2 * value))


def test_root_mean_square_of_zeros_is_zero_without_error():
    estimate = root_mean_square(torch.zeros(4, dtype=torch.float64))
    assert (estimate.value, estimate.stderr) == (0.0, 0.0)


def test_standard_error_of_a_share():
    estimate = share(torch.tensor([True, True, False, True]))
    assert estimate.value == 0.75
    assert estimate.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_percentiles_are_linearly_interpolated():
    four = torch.tensor([5.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert percentile(four, 0.0).value == 1.0
    assert percentile(four, 50.0).value == 3.0
    assert percentile(four, 100.0).value == 5.0
    assert math.isnan(percentile(four, 0.0).stderr)
    assert math.isnan(percentile(four, 100.0).stderr)


def test_the_error_of_a_percentile_is_that_of_many_draws():
    """The 90th percentile of 400 uniform numbers is off by sqrt(0.9 · 0.1 / 400) = 0.015."""
    draws = torch.rand(300, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [percentile(draw, 90.0) for draw in draws]
    spread = torch.tensor([e.value for e in found]).std().item()
    assert spread == pytest.approx(0.015, rel=0.15)
    assert sum(e.stderr for e in found) / len(found) == pytest.approx(0.015, rel=0.15)


def test_a_histogram_counts_every_number_once():
    numbers = torch.tensor([0.0, 1e-3, 0.01, 0.02, 0.09, 0.1, 0.5, 1.0, 70.0, math.nan], dtype=torch.float64)
    histogram = Histogram.of(numbers, decades=(-2, 0), a_decade=1)
    assert histogram.edges == (0.01, 0.1, 1.0)
    assert (histogram.below, histogram.counts, histogram.above) == (2, (3, 2), 2)
