"""MagCache, with the ratios of a calibration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, validate_call
from pydantic.dataclasses import dataclass

from cachekit.policies.reuses.scale import Scale
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset


@dataclass(frozen=True)
class Drift:
    """What has happened since the last recompute: the magnitude's estimated ratio, the accumulated error, the reuses."""

    ratio: float = 1.0
    error: float = 0.0
    reuses: int = 0


@dataclass(frozen=True, config=STRICT)
class drifted(Policy[Drift]):
    """Recompute where the estimated error of the residual's magnitude, accumulated since the last recompute, passes a threshold.

    At every step rho is multiplied by the step's calibrated ratio, and |1 - rho| is added to the error.
    """

    scale: Scale
    threshold: NonNegativeFloat
    limit: NonNegativeInt
    retention: Annotated[float, Field(ge=0, le=1)]

    def init(self) -> Drift:
        return Drift()

    def decide(self, state: Drift, step: Step) -> bool:
        ahead = self._ahead(state, step)
        return self._retained(step) or ahead.error > self.threshold or ahead.reuses > self.limit

    def update(self, state: Drift, step: Step, recomputed: bool) -> Drift:
        return Drift() if recomputed else self._ahead(state, step)

    def _ahead(self, state: Drift, step: Step) -> Drift:
        before = step.t if step.previous_t is None else step.previous_t
        ratio = state.ratio * self.scale.weights([before], step.t)[0]
        return Drift(ratio, state.error + abs(1.0 - ratio), state.reuses + 1)

    def _retained(self, step: Step) -> bool:
        times = self.scale.timesteps
        retained = int(self.retention * len(times) + 0.5)
        if 0 < retained < len(times):
            # Halfway: a model's own timesteps, scaled back, are off by a rounding.
            return step.t > (times[retained - 1] + times[retained]) / 2
        return retained > 0


@validate_call
def magcache(
    ratios: tuple[PositiveFloat, ...],
    timesteps: tuple[NonNegativeFloat, ...],
    threshold: NonNegativeFloat = 0.06,
    limit: NonNegativeInt = 3,
    retention: Annotated[float, Field(ge=0, le=1)] = 0.2,
) -> Preset:
    """Reuse the stack's residual while its calibrated magnitude drifts little (MagCache, arXiv 2506.09045).

    As diffusers' ``MagCacheConfig`` on the calibration's own schedule. On another one it interpolates the product of the ratios
    in t (see ``Scale``), where the authors take the ratio of the nearest step.

    Args:
        ratios: mean norm of the stack's residual at each timestep over that at the one before; the first is not used.
        timesteps: of the calibration, in the scheduler's units, falling.
        threshold: of the accumulated |1 - rho|.
        limit: most reuses in a row.
        retention: share of the calibration's timesteps, from the first, that are always full.

    Raises:
        ConfigError: as many ratios as timesteps are needed, and these must fall.
    """
    return Preset(drifted(Scale(timesteps, ratios), threshold, limit, retention), segments="all", reuse="residual")
