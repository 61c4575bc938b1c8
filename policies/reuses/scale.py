"""The newest value at the magnitude that a calibration saw at this time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from math import exp

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Step


@dataclass(frozen=True, config=STRICT)
class Scale:
    """The newest value times the product of the calibrated ratios since then.

    The ratios are MagCache's (arXiv 2506.09045): mean norm of a site's residual at a step over that at the step before. MagCache
    itself uses the product to decide when to recompute, and reuses the residual unscaled (``"residual"``); with this the
    magnitude is right as well, where the direction holds still. Exact on values that keep their direction and change their
    length by the ratios. Between calibrated timesteps the product is interpolated geometrically, so that the schedule may have
    another number of steps; beyond them it stays.

    Args:
        timesteps: of the calibration, falling.
        ratios: one for each timestep; the first is of no step before, and not used.
        beta: as ``Forecast``'s. The published ratios are those of residuals, hence 1.

    Raises:
        ConfigError: the lengths differ, or the timesteps don't fall.
    """

    timesteps: tuple[NonNegativeFloat, ...]
    ratios: tuple[PositiveFloat, ...]
    _: KW_ONLY
    beta: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.ratios) or not self.ratios:
            raise ConfigError(f"{len(self.ratios)} ratios for {len(self.timesteps)} timesteps; give one for each, at least one")
        if any(after >= before for before, after in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ConfigError("timesteps must fall from one to the next; sort them, and their ratios with them")

    @property
    def length(self) -> int:
        return 1

    def time(self, step: Step) -> float:
        """The step's timestep."""
        return step.t

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """The product of the ratios from the newest time to t."""
        return [exp(self._log_magnitude(t) - self._log_magnitude(times[0]))]

    def _log_magnitude(self, t: float) -> float:
        # But for a constant, which cancels: so the first ratio never counts.
        return float(np.interp(-t, [-time for time in self.timesteps], np.cumsum(np.log(self.ratios))))
