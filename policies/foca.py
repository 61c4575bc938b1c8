"""FoCa, "foca-5"."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.reuses.bdf import Bdf
from cachekit.preset import Preset


@validate_call
def foca(n: PositiveInt, *, warm_up: NonNegativeInt = 3) -> Preset:
    """TaylorSeer's schedule with FoCa's BDF2 forecast, Heun-corrected, of the stack's output (arXiv 2508.16211).

    The authors forecast each attention and MLP output; see ``taylorseer``. ``Bdf`` says what their two formulas come to, and
    where it differs.

    Args:
        n, warm_up: as ``taylorseer``'s.
    """
    return Preset(first(warm_up) | at_most(n - 1), segments="all", reuse=Bdf(axis="grid"))
