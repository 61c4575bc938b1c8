"""Bootstrap intervals for what a comparison measures, with the noise paired: every row is resampled alike.

Image k of every row starts from the same noise, so that the differences between rows vary far less than the rows do.

A resample holds fewer different images, so that its Frechet distance is larger than that of the samples, by about as much as that
of n samples is larger than that of infinitely many. So the resampled distances are moved back until their mean is the measured
one, and intervals are percentiles of those (Davison and Hinkley, Bootstrap Methods, 1997, section 5.2, without their correction for
bias). They are intervals for what n samples give on average, and not for the limit of many: rows are compared at the same n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
RESAMPLES = 1000
LEVEL = 0.95
# With fewer samples a covariance says so little that an interval around its distance would promise too much.
LEAST_SAMPLES = 100


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval, which are infinite where there are too few samples to say."""

    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def known(self) -> bool:
        """Whether there were enough samples for an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_json(self) -> dict[str, float | None]:
        """JSON has no infinity."""
        return {"value": self.value, "low": self.low if self.known else None, "high": self.high if self.known else None}


def resamples(n: int, seed: int = 0, count: int = RESAMPLES) -> Values:
    """How often each of n samples stands in each resample, shape (count, n); each row adds up to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), count).astype(np.float64)


def centred(value: float, resampled: Values) -> Values:
    """What a figure is in each resample, shape (count,), moved until its mean is the figure."""
    moved: Values = resampled - resampled.mean() + value
    return moved


def interval(value: float, resampled: Values) -> Interval:
    """The percentile interval of a figure, from what it is in each resample, shape (count,)."""
    low, high = np.quantile(centred(value, resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values: Values, counts: Values) -> Interval:
    """Mean of one number for each sample, shape (n,)."""
    return interval(float(values.mean()), counts @ values / len(values))


def frechet_resampled(features: Values, real: Values, counts: Values) -> Values:
    """The Frechet distance of each resample to real data, which stays as it is.

    The same as ``frechet`` of the repeated rows, for all resamples at once: moments are sums of products weighted by how often
    a row was drawn.

    Args:
        features: of samples, (n, d).
        real: of real data, (m, d).
        counts: from ``resamples(n)``, (count, n).

    Returns:
        Shape (count,).
    """
    n, d = features.shape
    # Around a common centre, since the variance would else be a small difference of large sums.
    centre = real.mean(0)
    shifted = features - centre
    means = counts @ shifted / n
    products = (shifted[:, :, None] * shifted[:, None, :]).reshape(n, d * d)
    covariances = ((counts @ products).reshape(-1, d, d) - n * means[:, :, None] * means[:, None, :]) / (n - 1)
    covariance = np.cov(real, rowvar=False).reshape(d, d)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # tr (Ca Cb)^1/2 is the sum of the square roots of the eigenvalues of Cb^1/2 Ca Cb^1/2, which is symmetric.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ covariances @ root).clip(0)).sum(1)
    traces = np.trace(covariances, axis1=1, axis2=2) + np.trace(covariance)
    return np.asarray((means**2).sum(1) + traces - 2 * mixed)


def relative_change(value: float, base: float, resampled: Values, base_resampled: Values) -> Interval:
    """value / base - 1 with both resampled alike, such as a Frechet distance against that of the uncached samples.

    Both are centred first: what resampling adds to either would else draw their ratio towards 1.
    """
    ratios = centred(value, resampled) / centred(base, base_resampled)
    low, high = np.quantile(ratios - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value / base - 1, float(low), float(high))
