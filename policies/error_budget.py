"""A budget for the error of the final sample, "error-budget-0.02"."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from pydantic import PositiveFloat, validate_call
from pydantic.dataclasses import dataclass as validated

from cachekit.amplification import Amplification, length
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.reuse import Forecast

# Above all that was measured on the shipped model, where DDIM and DPM-Solver++(2M) agree (docs/error-budget.md).
SHIPPED = Amplification((1000.0, 700.0, 300.0, 0.0), (36.0, 36.0, 9.0, 9.0))


@dataclass(frozen=True)
class Spent:
    """The bound on the final error so far, and the length of the last step."""

    bound: float = 0.0
    length: float = 0.0


@validated(frozen=True, config=STRICT)
class ErrorBudget(Policy[Spent]):
    """Recompute where the bound on the final sample's error would pass its share of a budget.

    Reusing a step of length h at t adds margin · a(t) · h · e to the bound, e being ``step.estimate`` and a(t) how much an error
    becomes until the end: the sum Σ h_i eps_i exp(L Σ_{j>i} h_j) of the classical bound for one-step methods (Hairer, Nørsett,
    Wanner, Solving Ordinary Differential Equations I, theorem II.3.4), with the exponential measured instead of bounded.
    The budget is given out evenly over the steps: after step i of n, (i + 1) / n of it may be spent, and what is left over
    stays. Given out at once, one long run of reuses at the start takes it all.

    No guarantee: e and a are estimates. How often the error stays under eps is measured in docs/error-budget.md. Costs one
    device synchronisation a step, and one more after a recompute. Where neither the number of steps nor t's range is known,
    every step is full, and stats say so.

    Args:
        eps: for the norm of the final sample's error over the norm of the uncached sample.
        amplification: a(t), from ``cachekit.measure_amplification`` on your model and sampler, or one number for all t.
            The default was measured on the shipped model.
        margin: what each cost is multiplied by.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"estimate", "end"})
    eps: PositiveFloat
    _: KW_ONLY
    amplification: Amplification | PositiveFloat = SHIPPED
    margin: PositiveFloat = 1.25

    def init(self) -> Spent:
        return Spent()

    def decide(self, state: Spent, step: Step) -> bool:
        # Written this way round, a cost that is no number recomputes.
        return not self._after_reuse(state, step) <= self.eps * _share(step)

    def update(self, state: Spent, step: Step, recomputed: bool) -> Spent:
        bound = state.bound if recomputed else self._after_reuse(state, step)
        return Spent(bound, length(step, state.length))

    def _after_reuse(self, state: Spent, step: Step) -> float:
        a = self.amplification(step.t) if isinstance(self.amplification, Amplification) else self.amplification
        return state.bound + self.margin * a * length(step, state.length) * step.estimate


def _share(step: Step) -> float:
    """How much of the budget may be spent when this step is over."""
    if step.steps is not None:
        return min(1.0, (step.i + 1) / step.steps)
    return 1.0 - step.t / step.range if step.range is not None else 0.0


@validate_call
def error_budget(eps: PositiveFloat, margin: PositiveFloat = 1.25) -> Preset:
    """Recompute where the estimated error of the final sample would pass eps, a share of its norm; forecast in between.

    ``ErrorBudget`` with the forecast of ``skip-every-N``.

    Args:
        eps: as ``ErrorBudget``'s.
        margin: as ``ErrorBudget``'s. 0.7 is enough for this very forecast on the shipped model, since its errors partly cancel
            from step to step; those of held values and of damped forecasts add up.
    """
    return Preset(ErrorBudget(eps, margin=margin), reuse=Forecast(order=2, bound=5.0, axis="grid"))
