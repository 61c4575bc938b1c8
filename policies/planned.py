"""A schedule that was made for one grid of timesteps, and for no other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Policy, Step

# A model's own timesteps, divided by the range in single precision and scaled back, are off by 6e-8 of it; two timesteps of a
# grid of thousands of steps differ by more than this share of the largest.
ROUNDING = 1e-5


@dataclass(frozen=True, config=STRICT)
class planned(Policy[None]):
    """Recompute at these places of a grid of timesteps; a second evaluation at one timestep (Heun's method) is always computed.

    Args:
        recompute: indices into ``timesteps``.
        timesteps: the different timesteps of a generation, in the order of its steps and in the scheduler's units. A step at
            any other raises ``ConfigError``: where a schedule was found says nothing about other grids.
    """

    recompute: tuple[NonNegativeInt, ...]
    timesteps: Annotated[tuple[float, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        if any(i >= len(self.timesteps) for i in self.recompute):
            raise ConfigError(f"recompute={self.recompute}: there are {len(self.timesteps)} timesteps, counted from 0")

    def decide(self, state: None, step: Step) -> bool:
        self._check(step)
        return step.t == step.previous_t or step.node in self.recompute

    def update(self, state: None, step: Step, recomputed: bool) -> None:
        # The first step is not decided on, since nothing is stored yet.
        self._check(step)

    def _check(self, step: Step) -> None:
        times, k = self.timesteps, step.node
        if k < len(times) and abs(step.t - times[k]) <= ROUNDING * max(1.0, *map(abs, times)):
            return
        here = f"timestep {k} of the plan is {times[k]:g}" if k < len(times) else f"the plan has only {len(times)} timesteps"
        raise ConfigError(
            f"this plan was made for another schedule: {here}, and step {step.i} is at t = {step.t:g}; sample with the scheduler "
            f"and the number of steps of the plan ({len(times)} timesteps from {times[0]:g} to {times[-1]:g}), or search again"
        )
