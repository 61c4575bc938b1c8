"""DuCa, "duca-3-0.05"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.reuses.tokens import Tokens
from cachekit.policy import Preset


@validate_call
def duca(
    n: PositiveInt = 3,
    share: Annotated[float, Field(gt=0, le=1)] = 0.05,
    *,
    by: Literal["similarity", "norm", "random"] = "random",
) -> Preset:
    """ToCa with every other reused step aggressive: there nothing at all is computed anew (DuCa, arXiv 2412.18911).

    After each full step the first reused one is aggressive and the second token-wise, in turn, as in the authors' code. On an
    aggressive step they reuse the residual of the whole stack, here every module's output. Random tokens are their second
    version's choice.

    Args:
        n, share, by: as ``toca``'s.
    """
    return Preset(every(n), segments="modules", reuse=Tokens(share, by=by, period=n, alternate=True))
