"""FasterCache, "fastercache"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.pab import broadcast
from cachekit.policies.reuses.frequencies import Frequencies
from cachekit.policies.reuses.mix import Mix
from cachekit.preset import Preset
from cachekit.segments import Segment

Close = Annotated[float, Field(ge=-1)]


@validate_call
def fastercache(
    n: PositiveInt = 2,
    uncond: NonNegativeInt = 5,
    *,
    start: NonNegativeFloat = 681.0,
    close: Close = -1.0,
    uncond_start: NonNegativeFloat = 641.0,
    uncond_close: Close = -1.0,
) -> Preset:
    """Self-attention on every n-th step, with a growing share of its change between; guidance's unconditional pass on every
    uncond-th, rebuilt from the conditional one between (FasterCache).

    arXiv 2410.19355, with the windows of diffusers' ``FasterCacheConfig``. Attention runs wherever the unconditional pass does, as
    it has it. Which pass is the conditional one, the branches' names say, or ``wrap``'s ``cond``; where that is known of none,
    every pass runs (``stats.notes``). Holds two tensors for each self-attention and output, and two predictions.

    Args:
        n: period of attention; 2 in the paper.
        uncond: period of the unconditional pass; 5 in the paper. 0 where there is none, as in models with distilled guidance.
        start, close, uncond_start, uncond_close: of the windows, close < t < start, outside of which everything runs.
    """
    attention = broadcast(n, start, close)
    if not uncond:
        return Preset(attention, segments="attn", reuse=Mix())
    both = broadcast(uncond, uncond_start, uncond_close)
    segments = [Segment("uncond", policy=both, reuse=Frequencies()), Segment(modules="attn", policy=attention | both)]
    return Preset(attention | both, segments=segments, reuse=Mix())
