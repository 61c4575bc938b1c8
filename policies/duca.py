"""DuCa, "duca-3-0.05"."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.reuses.tokens import By, Grid, Share, Slope, Tokens
from cachekit.preset import Preset


@validate_call
def duca(
    n: PositiveInt = 3,
    share: Share = 0.05,
    *,
    by: By = "random",
    slope: Slope = 0.0,
    grid: Grid | None = None,
) -> Preset:
    """ToCa with every other reused step aggressive: there nothing at all is computed anew (DuCa, arXiv 2412.18911).

    After each full step the first reused one is aggressive and the second token-wise, in turn, as in the authors' code. On an
    aggressive step they reuse the residual of the whole stack, here every module's output. Random tokens are their second
    version's choice; its other one is ``by="value"``.

    Args:
        n, share, by, slope, grid: as ``toca``'s.
    """
    return Preset(every(n), segments="modules", reuse=Tokens(share, by=by, period=n, slope=slope, grid=grid, alternate=True))
