"""SpeCa, "speca-0.3"."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call
from pydantic.dataclasses import dataclass

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.reuses.taylorseer import TaylorSeer
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.signals import Signal

CHECK = Signal("check")
Metric = Literal["elementwise", "relative", "euclidean"]


@dataclass(frozen=True)
class Draft:
    """How often the segment was reused since the last recompute, and how wrong the last forecast was."""

    reuses: int = 0
    error: float = 0.0


@dataclass(frozen=True, config=STRICT)
class verified(Policy[Draft]):
    """Recompute after a step whose check failed: where the block behind the segment is not what its forecast says.

    The error may be threshold * decay^progress, at least ``floor``; progress is the share of the steps that are over, or of the
    range of t. Where neither is known it may be ``floor``. Costs one device synchronisation a reused step.

    Args:
        threshold, decay, floor: of the error.
        unchecked: number of reuses after a recompute whose error is not looked at.
        metric: how the error is measured: see ``cachekit.Comparison``.
    """

    needs: ClassVar[frozenset[str | Signal]] = frozenset({CHECK, "end"})
    threshold: NonNegativeFloat
    decay: Annotated[float, Field(gt=0, le=1)]
    floor: NonNegativeFloat = 0.01
    unchecked: NonNegativeInt = 0
    metric: Metric = "elementwise"

    def init(self) -> Draft:
        return Draft()

    def decide(self, state: Draft, step: Step) -> bool:
        # Written this way round, an error that is no number recomputes.
        return not state.error <= self._allowed(step)

    def update(self, state: Draft, step: Step, recomputed: bool) -> Draft:
        if recomputed:
            return Draft()
        return Draft(state.reuses + 1, self._error(step) if state.reuses >= self.unchecked else 0.0)

    def _error(self, step: Step) -> float:
        check = step.pooled.signal(CHECK)
        if self.metric == "elementwise":
            return check.elementwise
        if self.metric == "relative":
            return check.relative
        return check.euclidean

    def _allowed(self, step: Step) -> float:
        if step.steps is not None:
            progress = step.i / step.steps
        elif step.range is not None:
            progress = 1.0 - step.t / step.range
        else:
            return self.floor
        allowed: float = self.threshold * self.decay**progress
        return max(self.floor, allowed)


@validate_call
def speca(
    threshold: NonNegativeFloat = 0.3,
    *,
    decay: Annotated[float, Field(gt=0, le=1)] = 0.05,
    floor: NonNegativeFloat = 0.01,
    order: NonNegativeInt = 1,
    warm_up: NonNegativeInt = 3,
    limit: PositiveInt = 8,
    unchecked: NonNegativeInt = 0,
    metric: Metric = "elementwise",
) -> Preset:
    """TaylorSeer of all but the last block, and a recompute once the last block refutes its own forecast (SpeCa, arXiv 2509.11628).

    The last block runs on every step, on what is forecast for the others; its output is compared with its own forecast.

    Args:
        threshold, decay, floor: the error may be max(floor, threshold * decay^progress); the authors' for DiT.
        order: of the forecast.
        warm_up: number of full steps at first.
        limit: most reuses in a row.
        unchecked: number of reuses after a full step whose error is not looked at.
        metric: of the error. ``"elementwise"`` is the authors' relative L1; ``"relative"`` and ``"euclidean"`` are relative to
            the whole output, and don't depend on its smallest elements.
    """
    policy = first(warm_up) | at_most(limit) | verified(threshold, decay, floor, unchecked, metric)
    return Preset(policy, segments=(0, -1), reuse=TaylorSeer(order, axis="grid"))
