"""cachekit's own preset, "skip-every-2"."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.last import tail
from cachekit.policies.moved import moved
from cachekit.preset import Preset
from cachekit.reuse import Forecast


@validate_call
def skip_every(n: PositiveInt) -> Preset:
    """One recompute in every n steps between a warm-up of three and a full tail (6 %), forecast to order 2
    along the sampler's grid with bounded weights.

    Steps that lie closer than half a stride to the last recompute are reused all the same, in the tail too: on a grid that is
    even in the log-SNR the last third of the steps covers a twentieth of the timesteps.
    The guards, the order and the bound come from measurements: docs/compare.md.
    """
    held_back = moved(0.5 if n > 1 else 0.0)
    policy = first(3) | (at_most(n - 1) | tail(0.06)) & held_back
    return Preset(policy, reuse=Forecast(order=2, bound=5.0, axis="grid"))
