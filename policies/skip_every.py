"""cachekit's own preset, "skip-every-2"."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.last import tail
from cachekit.policy import Preset
from cachekit.reuse import Forecast


@validate_call
def skip_every(n: PositiveInt) -> Preset:
    """One recompute in every n steps between a warm-up of three and a full tail (6 %), forecast to order 2
    along the sampler's grid with bounded weights.

    The guards, the order and the bound come from measurements: docs/compare.md.
    """
    return Preset(first(3) | at_most(n - 1) | tail(0.06), reuse=Forecast(order=2, bound=5.0, axis="grid"))
