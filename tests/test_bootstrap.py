"""The comparison's intervals: the fast path against the formula row by row, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekit.demo import bootstrap
from cachekit.demo.frechet import frechet


@settings(max_examples=25)
@given(n=st.integers(8, 40), d=st.integers(1, 5), seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 1e3]))
def test_all_resamples_at_once_are_each_alone(n: int, d: int, seed: int, offset: float) -> None:
    """``frechet`` of the rows repeated as drawn, far from the origin as well."""
    rng = np.random.default_rng(seed)
    features, real = rng.normal(size=(n, d)) * 2 + 1 + offset, rng.normal(size=(30, d)) + offset
    counts = bootstrap.resamples(n, seed, 4)
    assert counts.shape == (4, n) and (counts.sum(1) == n).all()
    found = bootstrap.frechet_resampled(features, real, counts)
    for drawn, distance in zip(counts, found, strict=True):
        rows = np.repeat(features, drawn.astype(int), axis=0)
        expected = frechet(rows.reshape(n, d), real) if d > 1 else one_dimensional(rows[:, 0], real[:, 0])
        # Square roots of eigenvalues that are zero but for rounding (few different rows) are off by sqrt(1e-16) = 1e-8 times
        # the scale of a standard deviation, which is below 10 here; d of them are added.
        assert distance == pytest.approx(expected, abs=1e-6 * d)


def one_dimensional(a: np.ndarray, b: np.ndarray) -> float:
    """(difference of means)² + (difference of standard deviations)²."""
    return float((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)


def test_an_interval_is_around_the_figure() -> None:
    """However far resampling moves all: 95 % of an even spread of 4, around 10."""
    found = bootstrap.interval(10.0, np.linspace(12.0, 16.0, 4001))
    assert found.value == 10.0
    assert (found.low, found.high) == pytest.approx((8.1, 11.9), abs=1e-6)


def test_intervals_of_distances_hold_what_as_many_samples_give_on_average() -> None:
    """200 draws of 150 samples whose distance is mostly bias: intervals may be too wide, but must not miss.

    95 % of 200 is 190 with a standard deviation of 3.1; 180 is three of those less. Measured: 199, and 168 without centring.
    """
    rng, counts = np.random.default_rng(0), bootstrap.resamples(150, count=200)
    real = rng.normal(size=(500, 4))
    drawn = [rng.normal(size=(150, 4)) * 1.05 for _ in range(200)]
    values = np.array([frechet(each, real) for each in drawn])
    resampled = [bootstrap.frechet_resampled(each, real, counts) for each in drawn]
    found = [bootstrap.interval(float(value), each) for value, each in zip(values, resampled, strict=True)]
    assert sum(each.low <= values.mean() <= each.high for each in found) >= 180
    assert sum(np.quantile(each, 0.025) <= values.mean() <= np.quantile(each, 0.975) for each in resampled) < 180


def test_intervals_of_means_hold_the_truth_as_often_as_they_say() -> None:
    """400 draws of 100 numbers; 95 % of 400 is 380 with a standard deviation of 4.4, and four of those are 17."""
    rng, counts = np.random.default_rng(0), bootstrap.resamples(100, count=400)
    held = 0
    for _ in range(400):
        found = bootstrap.mean_interval(rng.normal(size=100), counts)
        held += found.low <= 0.0 <= found.high
    assert 363 <= held <= 397


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """Two rows that differ little: the paired interval holds the small change, which unpaired ones could not tell from none."""
    rng = np.random.default_rng(0)
    real = rng.normal(size=(500, 3))
    base = rng.normal(size=(400, 3)) * 1.3 + 0.5
    row = base + 0.02 + 0.01 * rng.normal(size=base.shape)
    counts = bootstrap.resamples(len(base))
    a, b = (bootstrap.frechet_resampled(each, real, counts) for each in (row, base))
    value, other = frechet(row, real), frechet(base, real)
    paired = bootstrap.relative_change(value, other, a, b)
    unpaired = bootstrap.relative_change(value, other, a, bootstrap.frechet_resampled(base, real, bootstrap.resamples(400, seed=1)))
    assert paired.low > 0 and paired.low < paired.value < paired.high
    assert unpaired.low < 0 and unpaired.high - unpaired.low > 5 * (paired.high - paired.low)
    assert bootstrap.relative_change(other, other, b, b) == bootstrap.Interval(0.0, 0.0, 0.0)
