"""FoCa's forecast: a BDF2 predictor with a Heun corrector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Annotated

from pydantic import Field, PositiveFloat
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.reuse import Forecast


def slope(times: Sequence[float]) -> list[float]:
    """Weights of the derivative, at the newest of two or three times, of the polynomial through their values.

    On even times this is BDF1's or BDF2's difference quotient, the latter (3 F₀ - 4 F₁ + F₂) / 2h.
    """
    newest, *older = times
    if len(older) == 1:
        return [1.0 / (newest - older[0]), -1.0 / (newest - older[0])]
    a, b = (newest - time for time in older)
    return [1.0 / a + 1.0 / b, -b / (a * (b - a)), a / (b * (b - a))]


@dataclass(frozen=True)
class Bdf(Forecast):
    """Forecast F₀ + h F₀', with h from the newest value to now and F₀' a backward difference (FoCa, arXiv 2508.16211).

    FoCa predicts F̂ = 4/3 F₀ - 1/3 F₁ + 2h/3 F₀' (its equation 7), takes F̂' from BDF2's quotient of F̂, F₀ and F₁ (6), and
    corrects by Heun's rule, F₀ + h (F₀' + F̂') / 2 (8). Put (7) into (6): F̂' is F₀', whatever h is. So the corrected forecast is
    the tangent above, and all that is left to choose is how F₀' is estimated. From two values it is the line through them
    (2 F₀ - F₁ one even gap ahead), from three BDF2's quotient, here with the coefficients of the true, uneven times.
    Exact on linear functions at any spacing; on others with a smaller error than the line, as F₀' has one order more.

    The paper lets F₀ and F₁ be forecasts themselves. Here they are computed values: differences of forecasts would take an
    error of the slope along from one full step to the next, N - 1 times as large at period N.

    Args:
        order: number of values that F₀' is taken from, less one; at most 2.
        bound: as ``Forecast``'s; none in the paper.
    """

    order: Annotated[int, Field(ge=0, le=2)] = 2
    _: KW_ONLY
    bound: PositiveFloat = float("inf")

    def __post_init__(self) -> None:
        if self.highest > 2:
            raise ConfigError(f"{self}: the slope comes from three values at most; with order 2 leave blend out")

    def of_order(self, order: int, times: Sequence[float], t: float) -> list[float]:
        ahead = t - times[0]
        return [float(k == 0) + ahead * weight for k, weight in enumerate(slope(times[: order + 1]))]
