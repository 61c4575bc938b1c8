"""First-Block Cache, "first-block-0.05"."""

from __future__ import annotations

from pydantic import NonNegativeFloat, validate_call

from cachekit.policies.change import change
from cachekit.preset import Preset


@validate_call
def first_block(threshold: NonNegativeFloat = 0.05) -> Preset:
    """Run the first block; reuse the residual of all others while its own has changed little (First-Block Cache, ParaAttention).

    As diffusers' ``FirstBlockCacheConfig``, whose default this is: d = mean|r - r_last| / mean|r_last| with r the first block's
    residual and r_last that of the last recompute; the others are reused while d <= threshold, each stream with the residual
    that they added to it. As there, the means are over the whole batch (``change``'s ``pooled``). Costs one device
    synchronisation a step.
    """
    return Preset(change(threshold, pooled=True), segments=(1, None), reuse="residual")
