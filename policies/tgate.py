"""T-GATE, "tgate-10-5"."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.first import first
from cachekit.policies.since import since
from cachekit.preset import Preset
from cachekit.segments import Segment


@validate_call
def tgate(m: PositiveInt = 10, k: PositiveInt = 5, *, warm_up: NonNegativeInt = 2) -> Preset:
    """Cross-attention frozen after m steps; before that, self-attention recomputed every k-th step only (T-GATE, arXiv 2404.02747).

    The authors' schedule: steps 0 to ``warm_up`` are full, then self-attention runs at multiples of k until step m - 1, and always
    from there on. They also average the cross-attention of the conditional and unconditional halves at step m - 1 and leave
    classifier-free guidance out afterwards, which is the pipeline's business: here each half, or each branch, keeps its own and
    guidance goes on. Holds one tensor for each attention.

    Args:
        m: steps in which cross-attention runs; 10 of 25 in the authors' examples.
        k: period of self-attention before that.
        warm_up: the last of the full steps at first.
    """
    early = first(warm_up + 1) | every(k) | since(m - 1)
    segments = [Segment(modules="attn", policy=early), Segment(modules="cross_attn", policy=first(m))]
    return Preset(first(m), segments=segments, reuse="output")
