"""What a schedule's error will be, told from a calibration without running anything."""

from __future__ import annotations

import math

import numpy as np

from cachekit.calibration import SiteRecord, matrix
from cachekit.measures import Matrix
from cachekit.reuse import Forecast

_Errors = dict[tuple[tuple[int, ...], int], tuple[float, float]]


class ErrorModel:
    """Errors of the final sample, relative to the uncached one, where one site is reused.

    An error that is small is carried on linearly. So what step i alone does to the sample in the calibration's probe (r_i, by an
    error d_i of the site's value) tells what another error e_i there does: along d_i it is r_i scaled by <e_i, d_i> / |d_i|²; what
    stands at a right angle to d_i is taken to be amplified by as much, in a direction of its own. The former add up as vectors:
    errors of neighbouring steps, which point the same way or alternate, are no sum of their sizes.

    Args:
        site: what was recorded of it.
        reuse: a forecast without an input correction: what was recorded are the values themselves.
        timesteps: of the calibration.
    """

    def __init__(self, site: SiteRecord, reuse: Forecast, timesteps: tuple[float, ...]) -> None:
        self.reuse, self.timesteps = reuse, timesteps
        self.n = len(timesteps)
        self._gram, self._response = matrix(site.gram), matrix(site.response)
        self._times = [reuse.axis(t) for t in timesteps] if callable(reuse.axis) else list(timesteps)
        if reuse.axis == "grid":
            self._times = [float(i) for i in range(self.n)]
        self._probes = [self._probe(i) for i in range(self.n)]
        sizes = np.array([0.0, *(probe @ self._gram @ probe for probe in self._probes[1:])])
        self._sizes = np.maximum(sizes, np.finfo(np.float64).tiny)
        # Of the final error over that of the site's value, for each step.
        self.amplification: Matrix = np.sqrt(np.diag(self._response) / self._sizes)
        # As plain numbers, since schedules by the million are costed one step at a time.
        self._roots: list[float] = np.sqrt(self._sizes).tolist()
        self._amplified: list[float] = self.amplification.tolist()
        self._known: _Errors = {}

    def _probe(self, i: int) -> Matrix:
        """The probe's error at step i as weights of the values: minus its forecast to order 1 along the grid."""
        found = np.zeros(self.n)
        found[i] = 1.0
        if i > 1:
            found[i - 1], found[i - 2] = -2.0, 1.0
        elif i == 1:
            found[0] = -1.0
        return found

    def _weights(self, last: tuple[int, ...], i: int) -> Matrix:
        found = np.zeros(self.n)
        found[i] = 1.0
        weights = self.reuse.weights([self._times[k] for k in last[: self.reuse.length]], self._times[i])
        for k, weight in zip(last, weights, strict=False):
            found[k] -= weight
        return found

    def _error(self, last: tuple[int, ...], i: int) -> tuple[float, float]:
        """The error at step i: how many of the probe's it is along that, and how large the rest is, before amplification."""
        last = last[: self.reuse.length]
        if (last, i) not in self._known:
            weights = self._weights(last, i)
            used = [i, *last]
            # All other weights are zero.
            image = self._gram[:, used] @ weights[used]
            along = float(self._probes[i] @ image) / float(self._sizes[i])
            rest = float(weights[used] @ image[used]) - along**2 * float(self._sizes[i])
            self._known[last, i] = along, max(rest, 0.0) ** 0.5
        return self._known[last, i]

    def local(self, last: tuple[int, ...], i: int) -> float:
        """Relative error of the site's own value at step i, forecast from these recomputes (newest first)."""
        weights = self._weights(last, i)
        size = float(self._gram[i, i])
        return max(float(weights @ self._gram @ weights), 0.0) ** 0.5 / size**0.5 if size > 0 else float("nan")

    def cost(self, last: tuple[int, ...], i: int) -> float:
        """The error of the final sample if step i alone is reused, from these recomputes (newest first)."""
        along, rest = self._error(last, i)
        return math.hypot(along * self._roots[i], rest) * self._amplified[i]

    def predict(self, recompute: tuple[int, ...]) -> float:
        """The error of the final sample under a schedule, the indices of its recomputes rising."""
        scales, rests, last = np.zeros(self.n), np.zeros(self.n), tuple[int, ...]()
        full = set(recompute)
        for i in range(self.n):
            if i in full:
                last = (i, *last)[: self.reuse.length]
            else:
                scales[i], rests[i] = self._error(last, i)
        coherent = max(float(scales @ self._response @ scales), 0.0)
        return float(np.sqrt(coherent + np.sum((self.amplification * rests) ** 2)))
