"""What a schedule's error will be, told from a calibration without running anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cachekit.calibration import SiteRecord, matrix
from cachekit.measures import Matrix
from cachekit.probes import errors
from cachekit.reuse import Forecast

# Probes that nearly point the same way: what their difference does is told by the rounding of the samples.
PARALLEL = 1e-6


@dataclass(frozen=True)
class _Error:
    """An error at one step: its shares of the probes' (each of norm 1), the norm of the rest, and what it alone costs."""

    shares: Matrix
    rest: float
    cost: float


class ErrorModel:
    """Errors of the final sample, relative to the uncached one, where one site is reused.

    An error that is small is carried on linearly. So what reuse of step i alone did to the sample in the calibration's probes
    tells what another error of the site's value does there: what lies in the span of the probes' errors does as these did, and
    the rest, at a right angle to all of them, is taken to be amplified as that of the highest order, in a direction of its own.
    The former add up as vectors: errors of neighbouring steps, which point the same way or alternate, are no sum of their sizes.

    Args:
        site: what was recorded of it.
        reuse: a forecast without an input correction: what was recorded are the values themselves.
        timesteps: of the calibration.
    """

    def __init__(self, site: SiteRecord, reuse: Forecast, timesteps: tuple[float, ...]) -> None:
        self.reuse, self.timesteps = reuse, timesteps
        self.n = len(timesteps)
        self._gram = matrix(site.gram)
        self._times = [reuse.axis(t) for t in timesteps] if callable(reuse.axis) else list(timesteps)
        if reuse.axis == "grid":
            self._times = [float(i) for i in range(self.n)]
        probes = np.stack([errors(site.probes, i, self.n) for i in range(self.n)])
        sizes = np.einsum("ikj,jl,ikl->ik", probes, self._gram, probes)
        scales = np.divide(1.0, np.sqrt(sizes), out=np.zeros_like(sizes), where=sizes > 0)
        images = scales[:, :, None] * probes @ self._gram
        self._angles: Matrix = images @ (scales[:, :, None] * probes).transpose(0, 2, 1)
        # From weights of the values to shares of the probes' errors.
        self._shares: Matrix = np.linalg.pinv(self._angles, rcond=PARALLEL, hermitian=True) @ images
        flat = scales.T.flatten()
        self._response = matrix(site.response) * flat[:, None] * flat
        each = self._response.reshape(len(site.probes), self.n, len(site.probes), self.n)
        self._alone: Matrix = np.einsum("kili->ikl", each)
        # Of the final error over that of the site's value, for each step, where that is what the highest order leaves.
        costs = np.sqrt(np.einsum("ikk->ik", self._alone))
        self.amplification: Matrix = np.array([next((c for c in row[::-1] if c > 0), 0.0) for row in costs])
        self._known: dict[tuple[tuple[int, ...], int], _Error] = {}

    def _weights(self, last: tuple[int, ...], i: int) -> Matrix:
        found = np.zeros(self.n)
        found[i] = 1.0
        weights = self.reuse.weights([self._times[k] for k in last[: self.reuse.length]], self._times[i])
        for k, weight in zip(last, weights, strict=False):
            found[k] -= weight
        return found

    def _error(self, last: tuple[int, ...], i: int) -> _Error:
        """The error at step i, forecast from these recomputes."""
        last = last[: self.reuse.length]
        if (last, i) not in self._known:
            # All other weights are zero.
            used = [i, *last]
            weights = self._weights(last, i)[used]
            shares = self._shares[i][:, used] @ weights
            rest = float(weights @ self._gram[np.ix_(used, used)] @ weights - shares @ self._angles[i] @ shares)
            alone = float(shares @ self._alone[i] @ shares) + self.amplification[i] ** 2 * max(rest, 0.0)
            self._known[last, i] = _Error(shares, max(rest, 0.0) ** 0.5, max(alone, 0.0) ** 0.5)
        return self._known[last, i]

    def local(self, last: tuple[int, ...], i: int) -> float:
        """Relative error of the site's own value at step i, forecast from these recomputes (newest first)."""
        weights = self._weights(last, i)
        size = float(self._gram[i, i])
        return max(float(weights @ self._gram @ weights), 0.0) ** 0.5 / size**0.5 if size > 0 else float("nan")

    def cost(self, last: tuple[int, ...], i: int) -> float:
        """The error of the final sample if step i alone is reused, from these recomputes (newest first)."""
        return self._error(last, i).cost

    def predict(self, recompute: tuple[int, ...]) -> float:
        """The error of the final sample under a schedule, the indices of its recomputes rising."""
        shares, rests, last = np.zeros(self._shares.shape[:2]), np.zeros(self.n), tuple[int, ...]()
        full = set(recompute)
        for i in range(self.n):
            if i in full:
                last = (i, *last)[: self.reuse.length]
            else:
                error = self._error(last, i)
                shares[i], rests[i] = error.shares, error.rest
        along = shares.T.flatten()
        coherent = max(float(along @ self._response @ along), 0.0)
        return float(np.sqrt(coherent + np.sum((self.amplification * rests) ** 2)))
