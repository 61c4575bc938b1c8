"""Log-SNR as the variable along which any forecast runs: ``Forecast(order=2, axis=FlowLogSnr())``."""

from __future__ import annotations

from math import log

import numpy as np
from pydantic import Field, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT


@dataclass(frozen=True, config=STRICT)
class LogSnr:
    """λ(t) = log(α / σ) = ½ log(ᾱ / (1 - ᾱ)) of a variance-preserving schedule (DPM-Solver, arXiv 2206.00927, section 3).

    Args:
        alphas_cumprod: ᾱ at timesteps 0, 1, ...: ``tuple(scheduler.alphas_cumprod.tolist())``. λ is interpolated between whole
            timesteps and stays beyond the last; ᾱ within 1e-8 of 0 or 1, as with zero terminal SNR, counts as that far off.
    """

    alphas_cumprod: tuple[float, ...] = Field(repr=False, min_length=1)

    def __call__(self, t: float) -> float:
        """λ at a timestep in the scheduler's units."""
        low, share = divmod(min(max(t, 0.0), len(self.alphas_cumprod) - 1.0), 1.0)
        near, far = (self._at(min(int(low) + k, len(self.alphas_cumprod) - 1)) for k in range(2))
        return near + share * (far - near)

    def _at(self, index: int) -> float:
        share = float(np.clip(self.alphas_cumprod[index], 1e-8, 1 - 1e-8))
        return 0.5 * log(share / (1 - share))


@dataclass(frozen=True, config=STRICT)
class FlowLogSnr:
    """λ(t) = log((1 - σ) / σ) of flow matching's straight paths, x = (1 - σ) data + σ noise (arXiv 2209.03003), with σ = t / range.

    Args:
        range: training range of t.
        margin: σ nearer than that to 0 or 1 counts as that far off, since λ is infinite there and sampling starts at σ = 1.
    """

    range: PositiveFloat = 1000.0
    margin: float = Field(default=1e-3, gt=0, lt=0.5)

    def __call__(self, t: float) -> float:
        """λ at a timestep in the scheduler's units."""
        sigma = min(max(t / self.range, self.margin), 1 - self.margin)
        return log((1 - sigma) / sigma)
