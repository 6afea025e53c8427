import math
import statistics

import pytest
import torch

from mxperts.evaluation.statistics import mean, perplexity, root_mean_square, share

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
