"""EasyCache, "easycache-0.025"."""

from __future__ import annotations

from math import inf
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt, validate_call
from pydantic.dataclasses import dataclass

from cachekit.policies.first import first
from cachekit.policies.last import last
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.signals import Signal

STEPPED = Signal("sample", since="step")
MOVED = Signal("sample")
CHANGED = Signal("prediction")


@dataclass(frozen=True)
class Gain:
    """How much the output changes for a change of the input, the output's size, and the error that has added up."""

    rate: float = inf
    size: float = inf
    error: float = 0.0


@dataclass(frozen=True, config=STRICT)
class predicted(Policy[Gain]):
    """Recompute when the relative change of the output, predicted from that of the input and added up, reaches the threshold.

    k = |Δout| / |Δin| between the last two recomputes; every step adds k |Δx| / |out|, with x's change since the step before and
    the last computed out; all are mean absolute values. Costs one device synchronisation a step, and three at a recompute.
    """

    needs: ClassVar[frozenset[str | Signal]] = frozenset({STEPPED, MOVED, CHANGED})
    threshold: NonNegativeFloat

    def init(self) -> Gain:
        return Gain()

    def decide(self, state: Gain, step: Step) -> bool:
        # Written this way round, an error that is no number recomputes.
        return not self._ahead(state, step) < self.threshold

    def update(self, state: Gain, step: Step, recomputed: bool) -> Gain:
        if not recomputed:
            return Gain(state.rate, state.size, self._ahead(state, step))
        moved, changed = step.pooled.signal(MOVED).difference, step.pooled.signal(CHANGED)
        known = 0.0 < moved < inf
        return Gain(changed.difference / moved if known else inf, changed.size)

    def _ahead(self, state: Gain, step: Step) -> float:
        known = state.rate < inf and state.size > 0.0
        return state.error + state.rate * (step.pooled.signal(STEPPED).difference / state.size) if known else inf


@validate_call
def easycache(threshold: NonNegativeFloat = 0.025, *, warm_up: NonNegativeInt = 5) -> Preset:
    """Reuse what the whole model adds to its input while its output is predicted to change little (EasyCache, arXiv 2507.02860).

    No block is run on a reused step. The last step is full too (needs ``model.cachekit.session(steps=...)``; stats say where it
    was off). Each branch of classifier-free guidance decides for itself.

    Args:
        threshold: of the accumulated relative change; the authors' for HunyuanVideo.
        warm_up: number of full steps at first; 5 in the authors' code for HunyuanVideo, 7 for Wan.
    """
    return Preset(first(warm_up) | last(1) | predicted(threshold), segments="model", reuse="residual")
