"""Finds the best schedule of each site for a number of full steps: by prediction first, then by running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cachekit.candidates import Candidate, moves, periodic, ranked
from cachekit.error_model import ErrorModel
from cachekit.plan_file import Plan
from cachekit.reuse import Forecast
from cachekit.settle import settled
from cachekit.trials import Trials

FINALISTS = 3
STARTS = 2
OTHERS = 4


@dataclass
class Finder:
    """Finds the best candidate of each site, and keeps all plans on the way.

    Args:
        trials: runs candidates.
        models: of each site by its name, one for each reuse to choose from.
        tries: for each site and number of full steps, how many candidates are run by prediction, how many moves of each of the
            best two, and how many reuses of what comes of them.
    """

    trials: Trials
    models: dict[str, list[ErrorModel]]
    tries: int

    def __post_init__(self) -> None:
        self.plans: list[Plan] = []
        self._predictors: dict[tuple[str, Forecast], ErrorModel] = {}

    def at(self, count: int) -> list[Plan]:
        """The best plan of each site with so many full steps."""
        found = [self.trials.plan(self._best(name, models, count)) for name, models in self.models.items()]
        self.plans += found
        return found

    def _best(self, name: str, models: list[ErrorModel], count: int) -> Candidate:
        candidates = [candidate for _, candidate in ranked(name, models, count)]
        highest = max(model.reuse.highest for model in models)
        chosen = self._chosen(candidates, models)
        best = min(chosen[:FINALISTS], key=self.trials.score)
        if self.trials.error(best) == 0:
            # Nothing is reused, or to no effect.
            return best
        found = [settled(each, self.trials.better, tries=self.tries // 4, highest=highest) for each in _apart(chosen)[:FINALISTS]]
        # A schedule that was predicted to be bad with one forecast may be good with another.
        schedules = {candidate.recompute for candidate in candidates}
        # The second best may have better neighbours than the best has (docs/plans-measured.md).
        starts = _apart(sorted((best, *found), key=self.trials.score))[:STARTS]
        found = [self._climb(each, schedules) for each in starts]
        return settled(min(found, key=self.trials.score), self.trials.better, tries=self.tries, highest=highest)

    def _chosen(self, candidates: list[Candidate], models: list[ErrorModel]) -> list[Candidate]:
        """Those that are run, the best on a first look first."""
        # Each reuse has its chance, since their predictions may be off by different factors.
        chosen = candidates[: self.tries // 5]
        for model in models:
            chosen += [c for c in candidates if c.reuse == model.reuse][:2]
        # What policies of a fixed period do must not be missed because of a prediction.
        known = periodic(self.trials.calibration.timesteps)
        chosen += [c for c in candidates if c.recompute in known][: self.tries // 4]
        return sorted(dict.fromkeys(chosen), key=self.trials.glance)

    def _climb(self, best: Candidate, schedules: set[tuple[int, ...]]) -> Candidate:
        """Move one recompute at a time, what is predicted to help most first."""
        tried, tries = {best}, self.tries
        while tries > 0:
            around = [c for c in self._neighbours(best, schedules) if c not in tried][:tries]
            better = None
            for candidate in around:
                tries -= 1
                tried.add(candidate)
                if self.trials.better(candidate, best):
                    better = candidate
                    break
            if better is None:
                break
            best = better
        return best

    def _neighbours(self, best: Candidate, schedules: set[tuple[int, ...]]) -> list[Candidate]:
        """The same schedule along t, some others, and it with one recompute moved, best by prediction first."""
        model = self._predictor(best)
        # Few of them: they were made for small predictions, and would leave no try to what is near.
        others = sorted(schedules, key=model.predict)[:OTHERS]
        near = sorted({*moves(best.recompute, model.n, 3)}, key=model.predict)
        along_t = replace(best, reuse=replace(best.reuse, axis="t"))
        return [along_t, *(replace(best, recompute=recompute) for recompute in (*others, *near))]

    def _predictor(self, candidate: Candidate) -> ErrorModel:
        """What predicts errors of the candidate's reuse; nothing is known of an input's share."""
        key = candidate.site, replace(candidate.reuse, beta=0.0)
        if key not in self._predictors:
            calibration = self.trials.calibration
            self._predictors[key] = ErrorModel(calibration.site(candidate.site), key[1], calibration.timesteps)
        return self._predictors[key]


def _apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each schedule."""
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.recompute, candidate)
    return list(found.values())
