"""What a search may spend, and what it found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as validated

from cachekit.errors import ConfigError
from cachekit.plan_file import Plan
from cachekit.policy import STRICT


@validated(frozen=True, config=STRICT)
class Budget:
    """What a plan may cost; exactly one of the three.

    Args:
        full_steps: so many steps are recomputed, at the most.
        seconds: so long a generation takes, at the most, on this machine.
        error: so large is the relative error of the final sample, at the most, in the worst of the calibration's runs.
    """

    full_steps: PositiveInt | None = None
    seconds: PositiveFloat | None = None
    error: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.full_steps, self.seconds, self.error)) != 1:
            raise ConfigError(f"{self}: give one of full_steps, seconds and error")

    def fits(self, plan: Plan) -> bool:
        """Whether a plan keeps to it."""
        if self.full_steps is not None:
            return plan.full_steps <= self.full_steps
        return plan.seconds <= self.seconds if self.seconds is not None else plan.worst <= (self.error or 0.0)


@dataclass(frozen=True)
class Front:
    """The plans of a search of which none is both cheaper and better than another, the cheapest first.

    Attributes:
        plans: the Pareto front.
        budget: what was asked for.
        generations: how many the search ran.
    """

    plans: tuple[Plan, ...]
    budget: Budget
    generations: int

    @property
    def best(self) -> Plan:
        """The plan of least error that keeps to the budget; for a bound of the error, the cheapest one.

        Raises:
            ConfigError: none does.
        """
        fitting = [plan for plan in self.plans if self.budget.fits(plan)]
        if not fitting:
            raise ConfigError(f"no plan that was found keeps to {self.budget}; the front has: {self}")
        return fitting[0] if self.budget.error is not None else min(fitting, key=lambda plan: plan.error)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def __str__(self) -> str:
        return "\n".join(f"{plan}, {plan.blocks:.0%} of the blocks" for plan in self.plans)


def pareto(plans: Iterable[Plan], by_seconds: bool) -> tuple[Plan, ...]:
    """The plans of which none is both cheaper and better than another, the cheapest first; by seconds, or else by blocks."""

    def price(plan: Plan) -> float:
        return plan.seconds if by_seconds else plan.blocks

    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (price(plan), plan.error)):
        if not found or plan.error < found[-1].error:
            found.append(plan)
    return tuple(found)
