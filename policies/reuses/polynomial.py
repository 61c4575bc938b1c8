"""Held values, and polynomials through the newest ones: the names of cachekit's own ``Forecast``."""

from __future__ import annotations

from pydantic import NonNegativeFloat, validate_call

from cachekit.reuse import Forecast


def output() -> Forecast:
    """The newest output, held (FORA, arXiv 2407.01425; Skip-Cache, 2411.17616)."""
    return Forecast()


def residual() -> Forecast:
    """The newest residual, held and added to what enters now (Delta-DiT, arXiv 2406.01125)."""
    return Forecast(beta=1.0)


@validate_call
def taylor(k: NonNegativeFloat) -> Forecast:
    """The polynomial of degree k through the newest k + 1 outputs, by Lagrange's weights, bounded; 2.25 lies a quarter of the
    way from degree 2 to degree 3.
    """
    return Forecast(int(k), blend=k % 1)
