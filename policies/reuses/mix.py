"""FasterCache's mix: the newest value, and a growing share of its last change."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Step


@dataclass(frozen=True, config=STRICT)
class Mix:
    """F₀ + w (F₀ - F₁), w growing evenly from ``start`` at the first step to ``stop`` at the last (FasterCache, arXiv 2410.19355).

    How far the generation is, a session's number of steps says, or else t within its range; where neither is known, the newest
    value is held. w doesn't depend on how far F₁ lies back, nor on how long ago F₀ was computed.

    Args:
        start, stop: 0 and 1 in the paper.
    """

    start: NonNegativeFloat = 0.0
    stop: NonNegativeFloat = 1.0

    @property
    def length(self) -> int:
        return 2

    @property
    def beta(self) -> float:
        return 0.0

    def time(self, step: Step) -> float:
        """The share of the generation that is over, 0 to 1; below 0, and different for different timesteps, where it is unknown."""
        if step.steps is not None:
            return step.i / max(1, step.steps - 1)
        return -1.0 - step.node if step.range is None else 1 - step.t / step.range

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """1 + w and -w, or the newest alone."""
        if len(times) < 2 or t < 0:
            return [1.0]
        w = self.start + (self.stop - self.start) * min(t, 1.0)
        return [1.0 + w, -w]
