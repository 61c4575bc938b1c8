"""ToCa, "toca-3-0.07"."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.reuses.tokens import By, Grid, Share, Slope, Tokens
from cachekit.preset import Preset


@validate_call
def toca(
    n: PositiveInt = 3,
    share: Share = 0.07,
    *,
    by: By = "norm",
    slope: Slope = 0.0,
    grid: Grid | None = None,
) -> Preset:
    """Every n-th step is full; on others modules are reused, but for a share of each MLP's tokens (ToCa, arXiv 2410.05317).

    The authors' share grows with the step, as with ``slope=0.4``, and falls with the depth, which segments with ``Tokens`` of
    their own can do; their code multiplies it by 2.5 in MLPs, since attention computes none. Their period varies with the
    step; here it is constant. Holds one tensor for each module and output, and the ages of an MLP's tokens.

    Args:
        n: period.
        share: of the tokens that are computed anew, in the MLPs.
        by, slope, grid: how they are chosen, how the share grows, and how the tokens lie, see ``Tokens``.
    """
    return Preset(every(n), segments="modules", reuse=Tokens(share, by=by, period=n, slope=slope, grid=grid))
