"""DBCache, "dbcache-8-0-0.08"."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.front_change import front_change
from cachekit.policy import Policy
from cachekit.preset import Preset
from cachekit.segments import Segment


@validate_call
def dbcache(
    f: PositiveInt = 8,
    b: NonNegativeInt = 0,
    threshold: NonNegativeFloat = 0.08,
    *,
    warm_up: NonNegativeInt = 8,
    limit: NonNegativeInt | None = None,
) -> Preset:
    """First-Block Cache with f blocks as the probe, b blocks always run at the end, and full steps at first (DBCache, cache-dit).

    ``dbcache(1, 0, T, warm_up=0)`` is ``first_block(T)``. cache-dit reuses where d < threshold, this where d <= threshold: at a
    tie, and at a threshold of 0, the two differ.

    Args:
        f: number of blocks whose residual, taken together, is the probe.
        b: number of blocks at the end that run on top of what is reused. Where a stack has no more than f + b blocks, every
            block runs, and stats or an error say so.
        threshold: as First-Block Cache's.
        warm_up: number of full steps at first.
        limit: most reuses in a row; none unless given.
    """
    policy: Policy[object] = first(warm_up) | front_change(threshold, pooled=True)
    if limit is not None:
        policy = policy | at_most(limit)
    advice = (
        f"dbcache runs {f} blocks at the start and {b} at the end on every step, which leaves none here; write a smaller probe, "
        f"for example dbcache-2-0-{threshold}"
    )
    return Preset(policy, segments=Segment(f, -b if b else None, advice=advice), reuse="residual")
