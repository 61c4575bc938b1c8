"""Policies that come from a file: plans, and what is fitted to a calibration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import NonNegativeFloat, validate_call
from torch import nn

from cachekit.adapter import Adapter
from cachekit.calibration import Calibration
from cachekit.errors import ConfigError
from cachekit.for_model import ForModel
from cachekit.plan_file import FromPlan, Plan
from cachekit.policies.change import change
from cachekit.policies.first_block import first_block
from cachekit.policies.front_change import front_change
from cachekit.policies.magcache import magcache
from cachekit.policies.smoothcache import smoothcache
from cachekit.policies.teacache import teacache
from cachekit.preset import Preset


@dataclass(frozen=True)
class Fitted(ForModel):
    """What is fitted to a calibration as a policy: for the model that the calibration is of, or refused.

    Args:
        calibration: of the model that it will be given to.
        make: what makes the preset from it.
    """

    calibration: Calibration
    make: Callable[[Calibration], Preset]

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        """The fitted preset.

        Raises:
            ConfigError: the calibration is of another model, or lacks what is fitted.
        """
        self.calibration.model.check(model, "calibration")
        return self.make(self.calibration)


def _plan(file: str) -> FromPlan:
    """What ``cachekit.search`` found, from its file."""
    return FromPlan(Plan.load(file))


@validate_call
def _smoothcache(file: str, alpha: NonNegativeFloat = 0.1) -> Fitted:
    """SmoothCache: each kind of module held as long as its calibrated error stays under alpha."""
    return Fitted(Calibration.load(file), functools.partial(smoothcache, alpha=alpha))


@validate_call
def _magcache(file: str, threshold: NonNegativeFloat = 0.06) -> Fitted:
    """MagCache with the ratios of a calibration."""
    return Fitted(Calibration.load(file), functools.partial(_with_ratios, threshold=threshold))


@validate_call
def _teacache(file: str, threshold: NonNegativeFloat = 0.2) -> Fitted:
    """TeaCache with the polynomial that fits a calibration."""
    return Fitted(Calibration.load(file), functools.partial(_with_polynomial, threshold=threshold))


@validate_call
def _change(file: str, percentile: NonNegativeFloat) -> Fitted:
    """``change`` with a threshold at this percentile of what it saw from step to step in a calibration of ``"middle"``."""
    return Fitted(Calibration.load(file), functools.partial(_at_percentile, percentile=percentile, signal="change"))


@validate_call
def _front_change(file: str, percentile: NonNegativeFloat) -> Fitted:
    """``front_change``, likewise."""
    return Fitted(Calibration.load(file), functools.partial(_at_percentile, percentile=percentile, signal="front-change"))


@validate_call
def _teacache_percentile(file: str, percentile: NonNegativeFloat) -> Fitted:
    """TeaCache with the polynomial that fits a calibration, and a threshold at this percentile of what it adds a step there."""
    return Fitted(Calibration.load(file), functools.partial(_teacache_at, percentile=percentile))


@validate_call
def _first_block_percentile(file: str, percentile: NonNegativeFloat) -> Fitted:
    """First-Block Cache with a threshold at this percentile of the first block's change from step to step in a calibration."""
    return Fitted(Calibration.load(file), functools.partial(_first_block_at, percentile=percentile))


def _teacache_at(calibration: Calibration, percentile: float) -> Preset:
    return _with_polynomial(calibration, calibration.threshold("estimate", percentile))


def _first_block_at(calibration: Calibration, percentile: float) -> Preset:
    for name, record in calibration.sites.items():
        if record.segments[0].start == 1 and any(value is not None for value in record.change):
            return first_block(calibration.threshold("change", percentile, name))
    raise ConfigError(
        f"this calibration did not see the first block's change: none of its sites ({', '.join(map(repr, calibration.sites))}) "
        "begins with the second block; calibrate with sites=('middle',), or write first-block-THRESHOLD"
    )


def _with_ratios(calibration: Calibration, threshold: float) -> Preset:
    if not calibration.ratios:
        raise ConfigError("the calibration has no ratios for MagCache: its model has no blocks that were seen")
    return magcache(calibration.ratios, calibration.timesteps, threshold)


def _with_polynomial(calibration: Calibration, threshold: float) -> Preset:
    return teacache(threshold, coefficients=calibration.change_polynomial())


def _at_percentile(calibration: Calibration, percentile: float, signal: str) -> Preset:
    make = change if signal == "change" else front_change
    return Preset(make(calibration.threshold(signal, percentile)))


# Name in a spec string "NAME-NUMBERS:FILE" -> what makes the policy from the file and the numbers.
CALIBRATED: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "plan": _plan,
        "smoothcache": _smoothcache,
        "magcache": _magcache,
        "teacache": _teacache,
        "teacache-percentile": _teacache_percentile,
        "first-block-percentile": _first_block_percentile,
        "change-percentile": _change,
        "front-change-percentile": _front_change,
    }
)
