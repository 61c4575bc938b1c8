"""search: the schedule of least error for a price, on the very model and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import nn

from cachekit.adapter import Adapter
from cachekit.calibration import Calibration
from cachekit.error_model import ErrorModel
from cachekit.errors import ConfigError
from cachekit.finder import Finder
from cachekit.front import Budget, Front, pareto
from cachekit.generations import Sample, Sampler, check_runs, check_sites
from cachekit.reuse import Forecast
from cachekit.training_log import progress_bar
from cachekit.trials import Trials

REUSES = (*(Forecast(order, axis="grid") for order in (0, 1, 2)), Forecast(3, bound=12.0, axis="grid"))


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
    least maximum, with and without guards, beside even and periodic schedules (``cachekit.candidates``). The order of the forecast
    and the share of the input's change that is passed on (``blend``, ``beta``) are settled by running, and the bound of its
    weights (``cachekit.settle``). What counts in the end is what came out when they were run, on the calibration's noise: the
    mean of all samples' errors.

    Args:
        calibration: of this very model and sampler.
        model, sample, adapter: as for ``calibrate``; the model is unwrapped afterwards.
        budget: a number of full steps, or a ``Budget`` of seconds or of error.
        sites: names of the calibration's sites to choose from; all of them unless given.
        reuses: forecasts to choose from, without input correction (``beta``); such variants are tried on what is best, and
            blends of two orders, none higher than the highest of these.
        runs: how many of the calibration's runs to compare on, or numbers of others; all of its own unless given. A fixed
            schedule fits the noise that it is compared on a little: with few full steps take 20 samples and more.
        tries: for each site and number of full steps, how many candidates are run because they are predicted to be good, how many
            moves of each of the best two, and how many reuses of what comes of them; about as many more settle the reuses of the
            first few.
        progress: show a bar, where tqdm is installed.

    Returns:
        The Pareto front of the plans that were found, one for each site and number of full steps that was searched: the best of
        what was run there (for a budget of seconds or of error several numbers are searched). ``front.best.save("plan.json")``.

    Raises:
        ConfigError: another model or schedule than the calibration's, or a budget that can't mean what was written.
    """
    calibration.model.check(model, "calibration")
    wanted, reuses = _budget(budget), _reuses(reuses)
    if tries < 1:
        raise ConfigError(f"tries={tries}: how many candidates are run, at least one")
    n, names = len(calibration.timesteps), tuple(calibration.sites) if sites is None else check_sites(sites)
    if wanted.full_steps is not None and wanted.full_steps > n:
        raise ConfigError(f"{wanted}: there are only {n} steps to recompute")
    numbers = _runs(calibration, runs)
    models = {name: [ErrorModel(calibration.site(name), reuse, calibration.timesteps) for reuse in reuses] for name in names}
    sampler, bar = Sampler(model, sample, adapter), progress_bar(None, 0, progress)
    trials = Trials(sampler, calibration, numbers, (lambda: bar.update()) if bar is not None else (lambda: None))
    finder = Finder(trials, models, tries)
    try:
        _spend(finder, wanted, n)
    finally:
        sampler.unwrap()
        if bar is not None:
            bar.close()
    # Blocks don't count what is left out within them.
    by_seconds = wanted.seconds is not None or any(spec.modules for name in names for spec in calibration.site(name).segments)
    return Front(pareto(finder.plans, by_seconds), wanted, trials.generations)


def _budget(budget: Any) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 1:
        raise ConfigError(
            f"budget={budget!r}: give a number of full steps, at least one, or Budget(seconds=...) or Budget(error=...)"
        )
    return Budget(full_steps=int(budget))


def _reuses(reuses: Sequence[Any]) -> tuple[Forecast, ...]:
    found = () if isinstance(reuses, str) else tuple(reuses)
    if not found or not all(isinstance(reuse, Forecast) for reuse in found):
        raise ConfigError(
            f"reuses={reuses!r}: give the forecasts to choose from, such as (cachekit.Forecast(order=1, axis='grid'),)"
        )
    return found


def _runs(calibration: Calibration, runs: int | Sequence[int] | None) -> tuple[int, ...]:
    """The runs to compare on: so many of the calibration's, or others by their numbers."""
    if runs is None:
        return calibration.runs
    if isinstance(runs, int) and not 1 <= runs <= len(calibration.runs):
        raise ConfigError(
            f"runs={runs}: the calibration has {len(calibration.runs)} to take so many of; for more give numbers, runs=range(...)"
        )
    return calibration.runs[:runs] if isinstance(runs, int) else check_runs(runs)


def _spend(finder: Finder, budget: Budget, n: int) -> None:
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
