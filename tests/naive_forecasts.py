"""Published forecasts as their papers write them: plain loops over tensors, no weights. Histories have the newest value first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import factorial

import numpy as np
import reference
import torch
from reference import History
from torch import Tensor

from cachekit import Forecast
from cachekit.policies.reuses import Bdf, Chebyshev, Hermite, TaylorSeer

reference_forecast = reference.forecast


def derivatives(history: History, order: int) -> list[Tensor]:
    """TaylorSeer's state after all full steps: at each, D⁰ = F and Dʲ⁺¹ = (Dʲ - Dʲ_prev) / (t - t_prev)."""
    state: list[Tensor] = []
    before = 0.0
    for time, value in reversed(history):
        updated = [value]
        for j in range(min(order, len(state))):
            updated.append((updated[j] - state[j]) / (time - before))
        state, before = updated, time
    return state


def taylorseer(history: History, now: float, reuse: TaylorSeer) -> Tensor:
    """Σ_j Dʲ xʲ / j!"""
    total = torch.zeros_like(history[0][1])
    for j, derivative in enumerate(derivatives(history, reuse.order)):
        total = total + derivative * (now - history[0][0]) ** j / factorial(j)
    return total


# The physicists', written out.
HERMITE: Sequence[Callable[[float], float]] = (
    lambda y: 1.0,
    lambda y: 2 * y,
    lambda y: 4 * y**2 - 2,
    lambda y: 8 * y**3 - 12 * y,
)


def hermite(history: History, now: float, reuse: Hermite) -> Tensor:
    """Σ_j Dʲ sʲ H_j(s x) / j!, and a stored value at its own time."""
    total = torch.zeros_like(history[0][1])
    if now == history[0][0]:
        return history[0][1]
    for j, derivative in enumerate(derivatives(history, reuse.order)):
        total = total + derivative * reuse.scale**j * HERMITE[j](reuse.scale * (now - history[0][0])) / factorial(j)
    return total


def fitted(history: History, degree: int, now: float, derivative: int = 0) -> Tensor:
    """Value (or derivative) at a time of each element's least-squares polynomial, in powers of time on [-1, 1]."""
    times = np.array([time for time, _ in history])
    values = np.stack([value.numpy().ravel() for _, value in history])
    middle, half = (times.max() + times.min()) / 2, max(np.ptp(times) / 2, 1e-9)
    coefficients = np.polyfit((times - middle) / half, values, degree)
    found = []
    for column in coefficients.T:
        polynomial = np.poly1d(column)
        found.append(polynomial.deriv(derivative)((now - middle) / half) / half**derivative)
    return torch.tensor(np.array(found)).reshape(history[0][1].shape)


def chebyshev(history: History, now: float, reuse: Chebyshev) -> Tensor:
    """The best fit of the degree that the history allows."""
    degree = min(reuse.order, len(history) - 1)
    if degree == 0 or now == history[0][0]:
        return history[0][1]
    return fitted(history[: degree + 1 + reuse.extra], degree, now)


def bdf(history: History, now: float, reuse: Bdf) -> Tensor:
    """The tangent, with the slope of the parabola (or line) through the newest values."""
    order = min(reuse.order, len(history) - 1)
    if order == 0:
        return history[0][1]
    slope = fitted(history[: order + 1], order, history[0][0], derivative=1)
    return history[0][1] + (now - history[0][0]) * slope


def foca(f0: float, f1: float, f2: float, gap: float, h: float) -> float:
    """FoCa's equations (6) to (8) on even times: the slope by (6), the prediction (7), its slope by (6) again, Heun's rule (8)."""
    slope = (3 * f0 - 4 * f1 + f2) / (2 * gap)
    predicted = 4 / 3 * f0 - 1 / 3 * f1 + 2 * h / 3 * slope
    slope_there = (3 * predicted - 4 * f0 + f1) / (2 * h)
    return f0 + h / 2 * (slope + slope_there)


def naive(history: History, now: float, reuse: Forecast) -> Tensor:
    """What to return on a reused step; takes the place of ``reference.forecast``, which knows ``Forecast`` alone."""
    if isinstance(reuse, Hermite):
        return hermite(history, now, reuse)
    if isinstance(reuse, TaylorSeer):
        return taylorseer(history, now, reuse)
    if isinstance(reuse, Chebyshev):
        return chebyshev(history, now, reuse)
    if isinstance(reuse, Bdf):
        return bdf(history, now, reuse)
    return reference_forecast(history, now, reuse)
