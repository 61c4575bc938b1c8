"""Skip-Cache's fixed schedule, "N2-700-50"."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.outside import outside
from cachekit.policy import Policy


@validate_call
def skip_cache(n: PositiveInt, start: NonNegativeFloat, close: NonNegativeFloat) -> Policy[tuple[None, None]]:
    """Period n inside the window start > t >= close, full outside it (Skip-DiT, arXiv 2411.17616, "N2-700-50")."""
    return every(n) | outside(start, close)
