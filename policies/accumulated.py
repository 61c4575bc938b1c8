"""A threshold on what has changed since the last recompute, added up step by step."""

from __future__ import annotations

from dataclasses import KW_ONLY
from functools import reduce
from typing import Literal

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step
from cachekit.signals import Signal


@dataclass(frozen=True, config=STRICT)
class accumulated(Policy[float]):
    """Recompute when the changes from step to step, added up since the last recompute, reach the threshold.

    The change is d = mean|m - m_previous| / mean|m_previous|, and p(d) is added up (TeaCache's rule, arXiv 2411.19108). Costs
    one device synchronisation a step.

    Args:
        threshold: of the sum.
        signal: what m is. ``"modulated"``: the first block's normed and modulated input, for which that block is run up to its
            attention. ``"sample"``: the model's input. ``"probe"``, ``"front"``: what ``change`` and ``front_change`` look at.
        coefficients: of the polynomial p, highest power first; p(d) = d unless given.
        pooled: take the means over the whole batch, instead of the sample that changed most.
    """

    threshold: NonNegativeFloat
    _: KW_ONLY
    signal: Literal["modulated", "sample", "probe", "front"] = "modulated"
    coefficients: tuple[float, ...] = (1.0, 0.0)
    pooled: bool = False

    def init(self) -> float:
        return 0.0

    def decide(self, state: float, step: Step) -> bool:
        # Written this way round, a sum that is no number recomputes.
        return not self._ahead(state, step) < self.threshold

    def update(self, state: float, step: Step, recomputed: bool) -> float:
        return 0.0 if recomputed else self._ahead(state, step)

    def required(self) -> frozenset[str | Signal]:
        return frozenset({self._watched})

    @property
    def _watched(self) -> Signal:
        return Signal(self.signal, since="step")

    def _ahead(self, state: float, step: Step) -> float:
        change = (step.pooled if self.pooled else step).signal(self._watched).relative
        return state + reduce(lambda value, coefficient: value * change + coefficient, self.coefficients, 0.0)
