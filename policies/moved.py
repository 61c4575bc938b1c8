"""How far the timestep has moved."""

from __future__ import annotations

import math

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class moved(Policy[float]):
    """Recompute when t has moved by so many strides since the last recompute; a stride is the range over the number of steps.

    Joined with ``&`` it holds another policy back where steps lie so close that little changes between them, as at the end of a
    grid that is even in the log-SNR. Where the range or the number of steps is unknown it holds nothing back.
    """

    strides: NonNegativeFloat

    def init(self) -> float:
        return math.inf

    def decide(self, state: float, step: Step) -> bool:
        if step.steps is None or step.range is None:
            return True
        return abs(state - step.t) >= self.strides * step.range / step.steps

    def update(self, state: float, step: Step, recomputed: bool) -> float:
        return step.t if recomputed else state
