"""MagCache with published ratios, "magcache-0.06"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, validate_call
from torch import nn

from cachekit.adapter import Adapter
from cachekit.errors import ConfigError
from cachekit.for_model import ForModel, by_class
from cachekit.policies.magcache import magcache
from cachekit.preset import Preset


@dataclass(frozen=True)
class Measured:
    """Ratios of a residual's mean norm, and the timesteps of the run in which they were measured."""

    ratios: tuple[float, ...]
    timesteps: tuple[float, ...]


def shifted(steps: int, mu: float) -> tuple[float, ...]:
    """A flow's timesteps from 1000 down: sigma = 1, ..., 1 / steps, each moved to e^mu / (e^mu + 1 / sigma - 1)."""
    return tuple(1000.0 / (1.0 + exp(-mu) * (steps / (steps - i) - 1.0)) for i in range(steps))


# FLUX.1-dev, 28 steps of its pipeline at 1024 x 1024 (mu = 1.15): Zehong-Ma/MagCache, MagCache4FLUX/magcache_flux.py;
# diffusers ships the same as hooks.mag_cache.FLUX_MAG_RATIOS.
_FLUX = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562, 1.00781),
    *(1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
)
MEASURED: Mapping[str, Measured] = MappingProxyType({"FluxTransformer2DModel": Measured(_FLUX, shifted(28, 1.15))})


@dataclass(frozen=True)
class _Published(ForModel):
    threshold: float
    limit: int
    retention: float

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        found = by_class(model, MEASURED)
        if found is None:
            raise ConfigError(
                f"no published MagCache ratios are known for {type(model).__name__} (known: {', '.join(MEASURED)}); measure them: "
                f"write magcache-{self.threshold}:FILE with the file of cachekit.calibrate(...).save(FILE), or "
                f"cachekit.policies.magcache(ratios, timesteps, {self.threshold})"
            )
        return magcache(found.ratios, found.timesteps, self.threshold, self.limit, self.retention)


@validate_call
def magcache_published(
    threshold: NonNegativeFloat = 0.06,
    *,
    limit: NonNegativeInt = 3,
    retention: Annotated[float, Field(ge=0, le=1)] = 0.2,
) -> Preset:
    """Reuse the stack's residual while its published magnitude drifts little (MagCache, arXiv 2506.09045); known for FLUX.1-dev.

    ``magcache`` with the authors' ratios for the model that is wrapped, told by its class. The ratios belong to a checkpoint
    (FLUX.1-dev), and are used on whatever has its class. ``wrap`` raises ``ConfigError`` for models without any.

    Args:
        threshold, limit, retention: as ``magcache``'s; the defaults are diffusers'. The authors' script for FLUX has 0.24, 5
            and 0.1.
    """
    return _Published(threshold, limit, retention)
