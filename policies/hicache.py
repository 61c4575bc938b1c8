"""HiCache, "hicache-5-2"."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.reuses.hermite import Hermite
from cachekit.preset import Preset


@validate_call
def hicache(n: PositiveInt, order: NonNegativeInt = 2, *, warm_up: NonNegativeInt = 3) -> Preset:
    """TaylorSeer's schedule with HiCache's scaled Hermite forecast of the stack's output (arXiv 2508.16984).

    The authors forecast each attention and MLP output; see ``taylorseer``. Their scale is 0.5; give another with
    ``reuse=Hermite(order, scale)``.

    Args:
        n, warm_up: as ``taylorseer``'s.
        order: of the forecast; 1 to 3 in the paper.
    """
    return Preset(first(warm_up) | at_most(n - 1), segments="all", reuse=Hermite(order))
