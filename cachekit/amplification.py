"""How much an error at one step becomes in the final sample."""

from __future__ import annotations

import numpy as np
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Step


@dataclass(frozen=True, config=STRICT)
class Amplification:
    """a(t): a step of length h from t on, off by the relative error e, changes the final sample by a(t) h e.

    A length is a share of t's range, so that the lengths of a generation's steps sum up to 1 and a(t) does not depend on how
    many there are.

    Args:
        timesteps: where it was measured, in the scheduler's units, falling.
        factors: a at each of them; interpolated linearly in t between them, and the same beyond them.

    Raises:
        ValueError: the lengths differ, or the timesteps don't fall.
    """

    timesteps: tuple[NonNegativeFloat, ...]
    factors: tuple[NonNegativeFloat, ...]

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.factors) or not self.factors:
            raise ConfigError(f"{len(self.factors)} factors for {len(self.timesteps)} timesteps; give one for each, at least one")
        if any(after >= before for before, after in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ConfigError("timesteps must fall from one to the next; sort them, and their factors with them")

    def __call__(self, t: float) -> float:
        """a at a timestep in the scheduler's units."""
        return float(np.interp(-t, [-time for time in self.timesteps], self.factors))


def length(step: Step, before: float) -> float:
    """How long a step is, as a share of t's range: as long as the one before, since where t goes next is not known yet.

    Args:
        step: its ``range``, or its ``steps`` where that is unknown (then all are equally long), must be known.
        before: the length of the step before, which holds on where t stood still (a solver's second evaluation).
    """
    if step.range is None:
        return 1 / step.steps if step.steps else float("inf")
    if step.previous_t is None or step.previous_t == step.t:
        return before
    return abs(step.previous_t - step.t) / step.range
