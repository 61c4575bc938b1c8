"""FasterCache's part for attention, "fastercache"."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt, validate_call

from cachekit.policies.pab import broadcast
from cachekit.policies.reuses.mix import Mix
from cachekit.policy import Preset


@validate_call
def fastercache(n: PositiveInt = 2, start: NonNegativeFloat = 681.0, close: Annotated[float, Field(ge=-1)] = -1.0) -> Preset:
    """Self-attention on every n-th step below t = start; between, its last value and a growing share of its change (FasterCache).

    arXiv 2410.19355. Their rebuilding of the unconditional pass from the conditional one is not there: each branch is cached
    alone. diffusers' ``FasterCacheConfig``, whose window this is, counts its own approximations as values F₁; here, as in the
    paper, both values are computed ones. Holds two tensors for each self-attention and output.

    Args:
        n: period; 2 in the paper.
        start, close: of the window, close < t < start.
    """
    return Preset(broadcast(n, start, close), segments="attn", reuse=Mix())
