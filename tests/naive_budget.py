"""The error budget as a plain loop: its own history, its own estimates, its own bound."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Shape
from naive_forecasts import naive
from reference import History, exact_weights, remember
from torch import Tensor, nn

from cachekit import Forecast
from cachekit.policies.reuses import Hermite

RANGE = 1000.0


def forecast(history: History, now: float, reuse: Forecast) -> tuple[int, Tensor]:
    """The order in use and its value: the highest that there are values for and, but for damped forecasts, the bound allows."""
    nodes = [time for time, _ in history]
    order = min(reuse.order, len(history) - 1)
    if isinstance(reuse, Hermite):
        return order, naive(history, now, reuse)
    weights = [float(weight) for weight in exact_weights(nodes[: order + 1], now)]
    while order and sum(abs(weight) for weight in weights) > reuse.bound:
        order -= 1
        weights = [float(weight) for weight in exact_weights(nodes[: order + 1], now)]
    return order, sum((weight * value for weight, (_, value) in zip(weights, history, strict=False)), torch.zeros(()))


class Budget:
    """One site in one generation.

    Args:
        eps, margin: of the budget.
        a: how much an error at t becomes.
        reuse: of the site.
        steps: of the generation.
    """

    def __init__(self, eps: float, margin: float, a: Callable[[float], float], reuse: Forecast, steps: int) -> None:
        self.eps, self.margin, self.a, self.reuse, self.steps = eps, margin, a, reuse, steps
        self.history: History = []
        self.missed: tuple[float, float, float] | None = None
        self.bound = self.length = self.now = self.t = 0.0
        self.full: list[bool] = []

    def begin(self, t: float) -> None:
        """A step at t."""
        if self.full:
            self.length = (self.t - t) / RANGE
        self.t = t
        self.now = t if self.reuse.axis == "t" else float(len(self.full))

    def decide(self) -> bool:
        """Whether the site is recomputed; asked once a step."""
        error = self.estimate()
        after = None if error is None else self.bound + self.margin * self.a(self.t) * self.length * error
        full = after is None or after > self.eps * (len(self.full) + 1) / self.steps
        if after is not None and not full:
            self.bound = after
        self.full.append(full)
        return full

    def estimate(self) -> float | None:
        """Of the error of reusing now; None while nothing was missed yet."""
        if self.missed is None:
            return None
        missed, gap, size = self.missed
        kept = self.history[: self.reuse.order + 1]
        order, value = forecast(kept, self.now, self.reuse)
        further = abs(self.now - kept[0][0]) / gap
        carried = missed / size * (further if further < 1 else further ** (order + 1))
        if len(kept) == 1:
            return carried
        other = replace(self.reuse, order=order - 1 if order else 1, bound=1e9)
        return max(carried, float((value - forecast(kept, self.now, other)[1]).norm()) / size)

    def store(self, value: Tensor, entered: Tensor) -> None:
        """What a recompute gave."""
        kept = value - self.reuse.beta * entered if self.reuse.beta else value
        if self.history:
            wrong = forecast(self.history[: self.reuse.order + 1], self.now, self.reuse)[1] - kept
            self.missed = float(wrong.norm()), abs(self.now - self.history[0][0]), float(value.norm())
        remember(self.history, self.now, kept.clone())

    def value(self, entered: Tensor) -> Tensor:
        """What a reuse returns."""
        value = forecast(self.history[: self.reuse.order + 1], self.now, self.reuse)[1]
        return value + self.reuse.beta * entered if self.reuse.beta else value


class Middle:
    """Puts a budget over some of a model's blocks, each of which takes and returns the stream first and alone."""

    def __init__(self, model: nn.Module, paths: Sequence[str], budget: Budget) -> None:
        self.paths, self.budget = paths, budget
        self.is_full, self.entered = True, torch.zeros(0)
        for path in paths:
            block = model.get_submodule(path)
            block.__dict__["forward"] = functools.partial(self._visit, path, block.forward)

    def _visit(self, path: str, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if path == self.paths[0]:
            self.is_full, self.entered = self.budget.decide(), x.clone()
        result = original(x, *args, **kwargs) if self.is_full else x
        if path != self.paths[-1]:
            return result
        if self.is_full:
            self.budget.store(result, self.entered)
            return result
        return self.budget.value(self.entered)


def predictions(model: nn.Module, case: Case, times: Sequence[float], budget: Budget, whole: bool, shape: Shape) -> list[Tensor]:
    """One generation over samples that don't depend on the model; all but the first and last block, or the whole prediction."""
    if not whole:
        Middle(model, case.stack[1:-1], budget)
    conditioning, found = case.conditioning(0, shape), []
    for t in times:
        inputs = case.inputs(t, shape.batch, 0, shape.dtype, shape.scale, conditioning, times[0])
        budget.begin(t)
        if not whole or budget.decide():
            found.append(case.output(model(**inputs)).clone())
            if whole:
                budget.store(found[-1], inputs[case.names[0]])
        else:
            found.append(budget.value(inputs[case.names[0]]))
    return found
