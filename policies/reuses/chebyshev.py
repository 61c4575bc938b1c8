"""Least squares over the history, in Chebyshev's basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from pydantic import NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.reuse import Forecast


@dataclass(frozen=True)
class Chebyshev(Forecast):
    """The polynomial that fits the newest values best, of a degree below what would go through them all.

    Exact on polynomials of its degree at any spacing; of all weights that are, these have the least sum of squares, so that
    they amplify the values' errors least. Chebyshev's polynomials on the history's span stretched to [-1, 1] are there for
    the conditioning: the fit is the same in any basis. ChebBooster and Spectrum (arXiv 2603.01623, degree 4 over 10 values)
    add a ridge, which the fit here has not: with it a constant would no longer be forecast as itself.

    Args:
        order: degree of the polynomial; lowered while the history is shorter.
        extra: how many values more than order + 1 are kept; with none this is ``Forecast``.
        bound: as ``Forecast``'s; none in either paper.
    """

    order: NonNegativeInt = 2
    extra: NonNegativeInt = 2
    _: KW_ONLY
    bound: PositiveFloat = float("inf")

    @property
    def length(self) -> int:
        return self.highest + 1 + self.extra if self.highest else 1

    def of_order(self, order: int, times: Sequence[float], t: float) -> list[float]:
        nodes = np.asarray(times[: order + 1 + self.extra], dtype=np.float64)
        middle, half = (nodes.max() + nodes.min()) / 2, (nodes.max() - nodes.min()) / 2
        basis = chebvander((nodes - middle) / half, order)
        at = chebvander(np.asarray([(t - middle) / half]), order)[0]
        # The shortest weights w with Σ_k w_k T_j(node_k) = T_j(t) for every j.
        found: list[float] = np.linalg.lstsq(basis.T, at, rcond=None)[0].tolist()
        return found
