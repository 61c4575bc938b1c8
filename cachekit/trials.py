"""Run candidates on the calibration's noise, and remember what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachekit.calibration import Calibration
from cachekit.candidates import Candidate
from cachekit.errors import ConfigError
from cachekit.generations import Sampler, relative
from cachekit.json_files import ReuseSpec
from cachekit.plan_file import Plan
from cachekit.policies.every import every
from cachekit.policies.planned import planned

# A relative error that is none: samples are mostly of single precision, whose rounding is half of this.
NOTHING = 2.0**-23


class Trials:
    """Measured errors of candidates; nothing is run twice.

    Args:
        sampler: model and sampler that the calibration is of.
        calibration: where sites and timesteps come from.
        runs: numbers of the runs to compare on, the first third of them for a first look.
        tick: told of each generation.
    """

    def __init__(self, sampler: Sampler, calibration: Calibration, runs: tuple[int, ...], tick: Callable[[], Any]) -> None:
        self.sampler, self.calibration, self.runs, self.tick = sampler, calibration, runs, tick
        self._full: dict[int, Tensor] = {}
        self._errors: dict[tuple[Candidate, int], float] = {}
        self._seconds: dict[Candidate, list[float]] = {}
        self._blocks: dict[Candidate, float] = {}

    def full(self, run: int) -> Tensor:
        """The uncached sample of a run."""
        if run not in self._full:
            self.sampler.wrap(every(1), "model")
            self._full[run] = self.sampler.call(run).sample
            self.tick()
        return self._full[run]

    def error(self, candidate: Candidate) -> float:
        """Mean relative error of the runs."""
        return float(np.mean([self._error(candidate, run) for run in self.runs]))

    def score(self, candidate: Candidate, runs: int | None = None) -> float:
        """What candidates are compared by, less being better: the mean logarithm of the runs' errors, the first so many or all.

        A mean of the errors follows the run that differs most, and which that is is chance: on the Skip-DiT one batch of six
        outweighed five (docs/plans.md).
        """
        return float(np.mean([math.log(max(self._error(candidate, run), NOTHING)) for run in self.runs[:runs]]))

    def glance(self, candidate: Candidate) -> float:
        """The score on a first look, at a third of the runs."""
        return self.score(candidate, max(1, len(self.runs) // 3))

    def better(self, candidate: Candidate, than: Candidate) -> bool:
        """Whether one's score is below another's; a first look saves the other runs where it is not there."""
        return self.glance(candidate) < self.glance(than) and self.score(candidate) < self.score(than)

    def _error(self, candidate: Candidate, run: int) -> float:
        key = candidate, run
        if key not in self._errors:
            full, segments = self.full(run), [spec.segment() for spec in self.calibration.site(candidate.site).segments]
            # A plan for another schedule is refused at the first step that is not the calibration's.
            self.sampler.wrap(planned(candidate.recompute, self.calibration.timesteps), segments, candidate.reuse)
            try:
                outcome = self.sampler.call(run)
            except ConfigError:
                # Not every site has a residual: a prediction with learned variances is no sample's shape.
                if not candidate.reuse.beta:
                    raise
                self._errors[key] = float("inf")
                return self._errors[key]
            error = float(torch.linalg.vector_norm(relative(outcome.sample, full)))
            # One that ran away to infinity is as bad as can be, and must sort as such.
            self._errors[key] = error if np.isfinite(error) else float("inf")
            self._seconds.setdefault(candidate, []).append(outcome.seconds)
            self._blocks[candidate] = outcome.blocks
            self.tick()
        return self._errors[key]

    def plan(self, candidate: Candidate) -> Plan:
        """A candidate as a plan, measured on all runs."""
        errors = [self._error(candidate, run) for run in self.runs]
        return Plan(
            model=self.calibration.model,
            timesteps=self.calibration.timesteps,
            segments=self.calibration.site(candidate.site).segments,
            reuse=ReuseSpec.of(candidate.reuse),
            recompute=candidate.recompute,
            blocks=self._blocks[candidate],
            error=float(np.mean(errors)),
            worst=max(errors),
            seconds=float(np.median(self._seconds[candidate])),
            runs=self.runs,
        )

    @property
    def generations(self) -> int:
        """How many generations were run."""
        return len(self._errors) + len(self._full)
