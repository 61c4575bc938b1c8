"""Searches: what they return is what its plans do, within the budget, and no worse than the schedules they started from."""

from __future__ import annotations

import math
import time
from itertools import combinations, pairwise, permutations
from typing import Any, cast

import pytest
import torch
from calibrating import STEPS, grid, sampling, small

import cachekit
import cachekit.policies
from cachekit import Budget, Calibration, Forecast
from cachekit.candidates import Candidate, moves, ranked
from cachekit.error_model import ErrorModel
from cachekit.finder import OTHERS, Finder

SITES = ("model", "middle")
REUSES = (Forecast(axis="grid"), Forecast(order=1, axis="grid"))


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


@pytest.fixture(scope="module")
def calibration(model: Any) -> Calibration:
    return cachekit.calibrate(model, sampling(model), runs=2, sites=SITES, progress=False)


def searched(model: Any, calibration: Calibration, budget: Any, **options: Any) -> cachekit.Front:
    return cachekit.search(calibration, model, sampling(model), budget=budget, reuses=REUSES, tries=6, progress=False, **options)


def error(model: Any, policy: Any, run: int, **options: Any) -> float:
    full = sampling(cachekit.unwrap(model))(run)
    cachekit.wrap(model, policy, **options)
    found = sampling(model)(run)
    cachekit.unwrap(model)
    return float((found - full).double().norm() / full.double().norm())


def sample_errors(model: Any, policy: Any, **options: Any) -> float:
    """The mean over both runs of single images' errors, relative to their batch's mean square."""
    found = []
    for run in (0, 1):
        full = sampling(cachekit.unwrap(model))(run).double()
        cachekit.wrap(model, policy, **options)
        reused = sampling(model)(run).double()
        cachekit.unwrap(model)
        size = math.sqrt(sum(float(image.norm()) ** 2 for image in full) / len(full))
        found += [float((a - b).norm()) / size for a, b in zip(reused, full, strict=True)]
    return sum(found) / len(found)


def test_plans_do_what_they_say(model: Any, calibration: Calibration) -> None:
    """Errors on the calibration's runs, numbers of full steps, and the share of blocks that run."""
    front = searched(model, calibration, 4)
    assert "cachekit" not in model.__dict__ and front.generations > 0
    for plan in front:
        errors = [error(model, plan, run) for run in (0, 1)]
        # The sample's norms are summed in another order: 1e-12 of the norm, and the error is 1e-3 of it and more.
        assert plan.error == pytest.approx(sum(errors) / 2, rel=1e-6) and plan.worst == pytest.approx(max(errors), rel=1e-6)
        assert plan.full_steps == 4 and plan.timesteps == grid() and plan.runs == (0, 1)
        assert plan.reuse.order + plan.reuse.blend <= 1, "a higher order than those to choose from holds more"
        cachekit.wrap(model, plan)
        sampling(model)(0)
        stats = model.cachekit.stats
        assert plan.blocks == pytest.approx(stats.blocks_run / stats.blocks_total)
        cachekit.unwrap(model)


def test_the_front(model: Any, calibration: Calibration) -> None:
    """Cheapest first, each one better than those before it; the best is the one of least error."""
    front = searched(model, calibration, 5)
    plans = list(front)
    assert all(a.blocks <= b.blocks and a.error > b.error for a, b in pairwise(plans))
    assert front.best is min(plans, key=lambda plan: plan.error) and len(front) == len(plans) >= 1
    assert "5 of 8 steps recomputed" in str(front)


class Known:
    """Stands for ``Trials``: a candidate is the better the fewer of its recomputes are not the target's."""

    def __init__(self, calibration: Calibration, target: tuple[int, ...]) -> None:
        self.calibration, self.target = calibration, set(target)

    def better(self, candidate: Candidate, than: Candidate) -> bool:
        return len(self.target - set(candidate.recompute)) < len(self.target - set(than.recompute))


@pytest.mark.parametrize("target", sorted({*moves((0, 2, 4, 6), STEPS, 3)}))
def test_every_move_has_its_turn(calibration: Calibration, target: tuple[int, ...]) -> None:
    """However many other schedules are predicted to be better: one along t, a few others, and then what is near."""
    start = Candidate("model", REUSES[1], (0, 2, 4, 6))
    others = set[tuple[int, ...]](rest for rest in combinations(range(STEPS), 4) if rest[0] == 0 and rest != target)
    finder = Finder(cast(Any, Known(calibration, target)), {}, 1 + OTHERS + len({*moves(start.recompute, STEPS, 3)}))
    assert finder._climb(start, others).recompute == target


class Ranked(Known):
    """Stands for ``Trials``: schedules in this order, all others behind them, and none but the first is found to be better."""

    def __init__(self, calibration: Calibration, *order: tuple[int, ...]) -> None:
        super().__init__(calibration, order[0])
        self.order = order

    def score(self, candidate: Candidate) -> float:
        return 1.0 + (self.order.index(candidate.recompute) if candidate.recompute in self.order else len(self.order))

    glance = error = score

    def better(self, candidate: Candidate, than: Candidate) -> bool:
        return candidate.recompute == self.order[0] != than.recompute


def hidden(calibration: Calibration, models: list[ErrorModel]) -> list[tuple[tuple[int, ...], ...]]:
    """Schedules that are no candidates, one move away from a candidate (the last), but not from another (in the middle)."""
    candidates = sorted({candidate.recompute for _, candidate in ranked("model", models, 4)})
    return [
        (target, first, second)
        for first, second in permutations(candidates, 2)
        for target in sorted({*moves(second, STEPS, 3)} - {*candidates, *moves(first, STEPS, 3)})
    ]


def test_the_second_best_has_its_neighbours_tried(calibration: Calibration) -> None:
    """A schedule that is out of reach of the best candidate, but not of the second best."""
    models = [ErrorModel(calibration.site("model"), reuse, calibration.timesteps) for reuse in REUSES]
    cases = hidden(calibration, models)
    assert len(cases) > 10
    for case in cases:
        finder = Finder(cast(Any, Ranked(calibration, *case)), {}, 100)
        assert finder._best("model", models, 4).recompute == case[0]


def test_no_tries_where_nothing_is_reused(model: Any, calibration: Calibration) -> None:
    """Two uncached generations, and each site's two reuses on two runs."""
    front = searched(model, calibration, STEPS)
    assert front.best.error == 0.0 and front.generations <= 2 + len(SITES) * len(REUSES) * 2


@pytest.mark.parametrize("site", SITES)
def test_no_worse_than_even_schedules(model: Any, calibration: Calibration, site: str) -> None:
    """On the noise that it was compared on: an even schedule with each reuse is among what it starts from, or bettered."""
    for count in (3, 4, 6):
        plan = searched(model, calibration, count, sites=[site]).best
        found = sample_errors(model, plan)
        even = tuple(sorted({round(k * STEPS / count) for k in range(count)}))
        for reuse in REUSES:
            rival = cachekit.policies.planned(even, grid())
            rivals = sample_errors(model, rival, segments=site, reuse=reuse)
            # Norms are summed in another order, 1e-12 of them.
            assert found <= rivals * (1 + 1e-6)


def test_predictions_order_candidates(model: Any, calibration: Calibration) -> None:
    """The best by prediction is at least as good, when it is run, as the middle of all candidates of its number of full steps."""
    models = [ErrorModel(calibration.site("model"), reuse, grid()) for reuse in REUSES]
    candidates = [candidate for _, candidate in ranked("model", models, 4)]
    policies = [(cachekit.policies.planned(c.recompute, grid()), c.reuse) for c in candidates]
    errors = [error(model, policy, 0, segments="model", reuse=reuse) for policy, reuse in policies]
    assert errors[0] <= sorted(errors)[len(errors) // 2]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("reuse", (*REUSES, Forecast(order=2, axis="grid")))
def test_three_probes_predict_better_than_one(model: Any, calibration: Calibration, reuse: Forecast, site: str) -> None:
    """The logarithm of the ratio to what comes out, of every schedule of four steps."""
    one = cachekit.calibrate(model, sampling(model), runs=(0,), sites=(site,), probes=(1,), progress=False)
    schedules = [(0, *rest) for rest in combinations(range(1, STEPS), 3)]
    true = [error(model, cachekit.policies.planned(each, grid()), 0, segments=site, reuse=reuse) for each in schedules]
    off = []
    for record in (one.site(site), calibration.site(site)):
        told = ErrorModel(record, reuse, grid())
        off.append(math.sqrt(sum(math.log(told.predict(s) / e) ** 2 for s, e in zip(schedules, true, strict=True)) / len(true)))
    assert off[1] < (0.5 if site == "model" else 0.9) * off[0]
    assert off[1] < (0.1 if site == "model" else 0.3)


def test_budgets_of_error(model: Any, calibration: Calibration) -> None:
    """The cheapest plan that keeps to the bound in the worst run; one step less would not have."""
    loose = searched(model, calibration, 4, sites=["model"]).best.worst
    front = searched(model, calibration, Budget(error=loose), sites=["model"])
    assert front.best.worst <= loose and front.best.full_steps <= 4
    with pytest.raises(cachekit.ConfigError, match="no plan that was found keeps to"):
        _ = searched(model, calibration, Budget(seconds=1e-9), sites=["model"]).best


def test_budgets_of_seconds(model: Any, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that shows a second for each full step, so that a plan's seconds are its full steps."""
    seconds = [0.0]

    def one_more(*_: Any) -> None:
        seconds[0] += 1.0

    # On a reused step of the whole prediction no block is called.
    hook = model.transformer_blocks[0].register_forward_pre_hook(one_more)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    try:
        best = searched(model, calibration, Budget(seconds=4.5), sites=["model"]).best
        unlimited = searched(model, calibration, Budget(seconds=1e9), sites=["model"]).best
    finally:
        hook.remove()
    assert best.seconds == best.full_steps == 4
    assert unlimited.full_steps == STEPS and unlimited.error == 0.0


def test_what_is_refused(model: Any, calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="give one of full_steps, seconds and error"):
        Budget(full_steps=3, error=0.1)
    with pytest.raises(cachekit.ConfigError, match="there are only 8 steps"):
        searched(model, calibration, 9)
    for budget in (0, -1, True, 2.0, "4", None):
        with pytest.raises(cachekit.ConfigError, match="give a number of full steps, at least one"):
            searched(model, calibration, budget)
    for runs in (0, -1, 3):
        with pytest.raises(cachekit.ConfigError, match="the calibration has 2"):
            searched(model, calibration, 4, runs=runs)
    for options, says in (
        ({"reuses": ()}, "give the forecasts to choose from"),
        ({"reuses": ("taylor-1",)}, "give the forecasts to choose from"),
        ({"reuses": "taylor-1"}, "give the forecasts to choose from"),
        ({"sites": ()}, "give at least one"),
        ({"sites": "model"}, r"sites=\('model',\)"),
        ({"tries": 0}, "at least one"),
    ):
        with pytest.raises(cachekit.ConfigError, match=says):
            cachekit.search(calibration, model, sampling(model), budget=4, progress=False, **cast(Any, options))
    with pytest.raises(cachekit.ConfigError, match="was not calibrated"):
        searched(model, calibration, 4, sites=["all"])
    with pytest.raises(cachekit.ConfigError, match="made for another model"):
        searched(cachekit.add_long_skips(small()), calibration, 4)
    with pytest.raises(cachekit.ConfigError, match="another schedule"):
        cachekit.search(calibration, model, sampling(model, 6), budget=3, tries=2, progress=False)
    assert "cachekit" not in model.__dict__ and torch.isfinite(sampling(model)(0)).all()
