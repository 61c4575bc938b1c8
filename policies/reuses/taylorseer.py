"""TaylorSeer's own recursion of derivative estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from math import factorial

from pydantic import NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.reuse import Forecast


def recursive_differences(times: Sequence[float]) -> list[list[float]]:
    """TaylorSeer's estimates of the derivatives at the newest of n times, as weights of the values.

    D⁰ = F, Dʲ⁺¹ = (Dʲ - Dʲ_prev) / (t - t_prev), each at its own full step. On even times these are the powers of the backward
    difference over those of the gap; on uneven ones all but D⁰ and D¹ have the gaps of finite differences wrong.

    Returns:
        n rows of n weights each, newest first: row j is Dʲ.
    """
    n = len(times)
    rows = [[[float(k == m) for m in range(n)] for k in range(n)]]
    for j in range(1, n):
        before = rows[-1]
        gaps = [times[k] - times[k + 1] for k in range(n - j)]
        rows.append([[(a - b) / gap for a, b in zip(before[k], before[k + 1], strict=True)] for k, gap in enumerate(gaps)])
    return [row[0] for row in rows]


@dataclass(frozen=True)
class TaylorSeer(Forecast):
    """Forecast Σ_j Dʲ xʲ / j! with x = t - t_newest and the recursion's Dʲ (TaylorSeer, arXiv 2503.06923, equations 4 to 6).

    Exact on linear functions at any spacing. Orders 0 and 1 are those of ``Forecast``. From order 2 on it is another forecast,
    on even times too: Newton's form has x (x + h) / 2 where Taylor's has x² / 2, and the difference estimate D² is one of the
    derivative a gap earlier. So it is exact on no quadratic; ``Forecast`` is.

    Args:
        order: 1 to 4 in the paper; lowered while the history is shorter.
        bound: as ``Forecast``'s; none in the authors' code.
    """

    order: NonNegativeInt = 1
    _: KW_ONLY
    bound: PositiveFloat = float("inf")

    def of_order(self, order: int, times: Sequence[float], t: float) -> list[float]:
        differences = recursive_differences(times[: order + 1])
        terms = [self.term(j, t - times[0]) for j in range(order + 1)]
        return [sum(term * row[k] for term, row in zip(terms, differences, strict=True)) for k in range(order + 1)]

    def term(self, j: int, x: float) -> float:
        """What the estimate of the j-th derivative is multiplied by, x ahead of the newest value."""
        return x**j / factorial(j)
