"""HiCache's forecast: Taylor's with the powers replaced by scaled Hermite polynomials."""

from __future__ import annotations

from dataclasses import KW_ONLY
from math import factorial

from numpy.polynomial.hermite import hermval
from pydantic import NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.policies.reuses.taylorseer import TaylorSeer
from cachekit.reuse import Axis


@dataclass(frozen=True)
class Hermite(TaylorSeer):
    """Forecast Σ_j Dʲ sʲ H_j(s x) / j! with TaylorSeer's Dʲ and the physicists' H_j (HiCache, arXiv 2508.16984, "dual scaling").

    With c = 2 s² the terms are c x, c² (x² - 1 / c) / 2, ...: at order 1 it passes on the share c of TaylorSeer's change, half
    of it at s = 0.5. So it is exact on constants, and on linear functions at s = √½ only: it trades exactness for damping.
    A stored value at its own time is returned as it is, where the formula gives something else from order 2 on.

    Args:
        order: 1 to 3 in the paper; lowered while the history is shorter.
        scale: s, per unit of the axis; the authors use 0.5 to 0.7.
        axis: the authors count steps; along t a unit is one timestep, and s must shrink accordingly.
    """

    order: NonNegativeInt = 2
    scale: PositiveFloat = 0.5
    _: KW_ONLY
    axis: Axis = "grid"

    def term(self, j: int, x: float) -> float:
        """sʲ H_j(s x) / j!"""
        return float(self.scale**j * hermval(self.scale * x, [0.0] * j + [1.0])) / factorial(j)
