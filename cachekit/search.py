"""search: the schedule of least error for a price, on the very model and sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as validated
from torch import nn

from cachekit.adapter import Adapter
from cachekit.calibration import Calibration
from cachekit.candidates import Candidate, moves, periodic, ranked
from cachekit.corrections import corrected
from cachekit.error_model import ErrorModel
from cachekit.errors import ConfigError
from cachekit.generations import Sample, Sampler, check_runs
from cachekit.plan_file import Plan
from cachekit.policy import STRICT
from cachekit.reuse import Forecast
from cachekit.training_log import progress_bar
from cachekit.trials import Trials

REUSES = (*(Forecast(order, axis="grid") for order in (0, 1, 2)), Forecast(3, bound=12.0, axis="grid"))
# What a good schedule is tried with as well. A calibration knows nothing of input corrections.
VARIANTS: tuple[dict[str, Any], ...] = ({"beta": 0.5}, {"axis": "t"}, {"bound": 12.0}, {"order": 1}, {"order": 2}, {"order": 3})


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


def search(
    calibration: Calibration,
    model: nn.Module,
    sample: Sample,
    *,
    budget: int | Budget,
    sites: Sequence[str] | None = None,
    reuses: Sequence[Forecast] = REUSES,
    runs: int | Sequence[int] | None = None,
    tries: int = 40,
    adapter: Adapter | str | None = None,
    progress: bool = True,
) -> Front:
    """Find schedules of little error by prediction, run the best, and better those by moving one recompute at a time.

    Candidates come from dynamic programming over (step, last recomputes) on the calibration's errors, for the least sum and the
    least maximum, with and without guards, beside even and periodic schedules (``cachekit.candidates``). The share of the input's
    change that is passed on (``beta``) is settled last (``cachekit.corrections``). What counts in the end is what came out when
    they were run, on the calibration's noise.

    Args:
        calibration: of this very model and sampler.
        model, sample, adapter: as for ``calibrate``; the model is unwrapped afterwards.
        budget: a number of full steps, or a ``Budget`` of seconds or of error.
        sites: names of the calibration's sites to choose from; all of them unless given.
        reuses: forecasts to choose from, without input correction (``beta``); such variants are tried on what is best.
        runs: how many of the calibration's runs to compare on, or numbers of others; all of its own unless given. A fixed
            schedule fits other noise about as well as this, yet two runs and more are safer than one.
        tries: how many candidates are run for each site and number of full steps; six more, at the most, settle how much of its
            input's change the best one passes on.
        progress: show a bar, where tqdm is installed.

    Returns:
        The Pareto front of the plans that were found, one for each site and number of full steps that was searched: the best of
        what was run there (for a budget of seconds or of error several numbers are searched). ``front.best.save("plan.json")``.

    Raises:
        ConfigError: another model or schedule than the calibration's, or a budget that can't mean what was written.
    """
    calibration.model.check(model, "calibration")
    wanted = Budget(full_steps=budget) if isinstance(budget, int) else budget
    n, names = len(calibration.timesteps), tuple(calibration.sites) if sites is None else tuple(sites)
    if wanted.full_steps is not None and wanted.full_steps > n:
        raise ConfigError(f"{wanted}: there are only {n} steps to recompute")
    numbers = calibration.runs if runs is None else calibration.runs[:runs] if isinstance(runs, int) else check_runs(runs)
    models = {name: [ErrorModel(calibration.site(name), reuse, calibration.timesteps) for reuse in reuses] for name in names}
    sampler, bar = Sampler(model, sample, adapter), progress_bar(None, 0, progress)
    trials = Trials(sampler, calibration, numbers, (lambda: bar.update()) if bar is not None else (lambda: None))
    finder = _Finder(trials, models, tries)
    try:
        _spend(finder, wanted, n)
    finally:
        sampler.unwrap()
        if bar is not None:
            bar.close()
    # Blocks don't count what is left out within them.
    by_seconds = wanted.seconds is not None or any(spec.modules for name in names for spec in calibration.site(name).segments)
    return Front(_pareto(finder.plans, by_seconds), wanted, trials.generations)


@dataclass
class _Finder:
    """Finds the best candidate of each site for a number of full steps, and keeps all plans on the way."""

    trials: Trials
    models: dict[str, list[ErrorModel]]
    tries: int

    def __post_init__(self) -> None:
        self.plans: list[Plan] = []

    def at(self, count: int) -> list[Plan]:
        """The best plan of each site with so many full steps."""
        found = [self._best(name, models, count) for name, models in self.models.items()]
        self.plans += found
        return found

    def _best(self, name: str, models: list[ErrorModel], count: int) -> Plan:
        candidates = ranked(name, models, count)
        # Each reuse has its chance, since their predictions may be off by different factors.
        chosen = [candidate for _, candidate in candidates[: self.tries // 5]]
        for model in models:
            chosen += [c for _, c in candidates if c.reuse == model.reuse][:2]
        # What policies of a fixed period do must not be missed because of a prediction.
        known = periodic(self.trials.calibration.timesteps)
        chosen += [c for _, c in candidates if c.recompute in known][: self.tries // 4]
        chosen = sorted(dict.fromkeys(chosen), key=lambda c: self.trials.error(c, 1))
        best = min(chosen[:3], key=self.trials.error)
        best = self._climb(best, {model.reuse: model for model in models}, self.tries - len(chosen))
        return self.trials.plan(corrected(best, self.trials.error))

    def _climb(self, best: Candidate, models: dict[Forecast, ErrorModel], tries: int) -> Candidate:
        """Move one recompute at a time, what is predicted to help most first; other reuses between whiles."""
        tried = {best}
        while tries > 0:
            around = [c for c in _neighbours(best, models) if c not in tried]
            if not around:
                break
            better = None
            for candidate in around:
                tries -= 1
                tried.add(candidate)
                # A first look on one run saves the others.
                if all(self.trials.error(candidate, runs) < self.trials.error(best, runs) for runs in (1, None)):
                    better = candidate
                    break
                if tries <= 0:
                    break
            if better is None:
                break
            best = better
        return best


def _neighbours(best: Candidate, models: dict[Forecast, ErrorModel]) -> list[Candidate]:
    """The same schedule with other reuses, then schedules with one recompute moved, best by prediction first."""
    model = (
        models.get(best.reuse) or models.get(replace(best.reuse, beta=0.0, axis="grid", bound=5.0)) or next(iter(models.values()))
    )
    others = [replace(best, reuse=replace(best.reuse, **changes)) for changes in VARIANTS]
    near = sorted({*moves(best.recompute, model.n, 3)}, key=model.predict)
    return [c for c in others if c != best] + [replace(best, recompute=recompute) for recompute in near]


def _spend(finder: _Finder, budget: Budget, n: int) -> None:
    """Search at the budget's number of full steps; else halve the range of numbers until one is left."""
    if budget.full_steps is not None:
        finder.at(budget.full_steps)
        return
    low, high = 1, n
    while low < high:
        middle = (low + high + (budget.seconds is not None)) // 2
        fits = any(budget.fits(plan) for plan in finder.at(middle))
        if budget.seconds is not None:
            low, high = (middle, high) if fits else (low, middle - 1)
        else:
            low, high = (low, middle) if fits else (middle + 1, high)
    if not any(plan.full_steps == low for plan in finder.plans):
        finder.at(low)


def _pareto(plans: list[Plan], by_seconds: bool) -> tuple[Plan, ...]:
    def price(plan: Plan) -> float:
        return plan.seconds if by_seconds else plan.blocks

    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (price(plan), plan.error)):
        if not found or plan.error < found[-1].error:
            found.append(plan)
    return tuple(found)
