"""ToCa, "toca-3-0.07"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.reuses.tokens import Tokens
from cachekit.policy import Preset


@validate_call
def toca(
    n: PositiveInt = 3,
    share: Annotated[float, Field(gt=0, le=1)] = 0.07,
    *,
    by: Literal["norm", "similarity", "random"] = "norm",
) -> Preset:
    """Every n-th step is full; on others modules are reused, but for a share of each MLP's tokens (ToCa, arXiv 2410.05317).

    The authors' share varies with step and depth around this one, and their period with the step; here both are constant. Holds
    one tensor for each module and output, and the ages of an MLP's tokens.

    Args:
        n: period.
        share: of the tokens that are computed anew, in the MLPs.
        by: how they are chosen, see ``Tokens``.
    """
    return Preset(every(n), segments="modules", reuse=Tokens(share, by=by, period=n))
