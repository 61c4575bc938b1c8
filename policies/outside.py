"""A timestep window."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class outside(Policy[None]):
    """Recompute outside the window start > t >= close (Skip-Cache, arXiv 2411.17616).

    As in the authors' code the lower bound takes effect one call late: the first step below ``close`` may still reuse.
    """

    start: NonNegativeFloat
    close: NonNegativeFloat = 0.0

    def decide(self, state: None, step: Step) -> bool:
        return step.t >= self.start or (step.previous_t is not None and step.previous_t < self.close)
