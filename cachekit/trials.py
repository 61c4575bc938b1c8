"""Run candidates on the calibration's noise, and remember what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cachekit.calibration import Calibration
from cachekit.candidates import Candidate
from cachekit.errors import ConfigError
from cachekit.generations import Sampler, relative, sample_errors
from cachekit.json_files import ReuseSpec
from cachekit.measures import Matrix
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
        self._errors: dict[tuple[Candidate, int], tuple[float, Matrix]] = {}
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
        return float(np.mean([self._error(candidate, run)[0] for run in self.runs]))

    def score(self, candidate: Candidate) -> float:
        """What decides between candidates, less being better: the mean error of all samples."""
        return float(np.mean(self._of_samples(candidate, self.runs)))

    def glance(self, candidate: Candidate) -> float:
        """A first look, at a third of the runs: the mean logarithm of their samples' errors.

        Of so few a mean of the errors follows the one that differs most, and which that is is chance (docs/plans-measured.md).
        """
        some = self.runs[: max(1, len(self.runs) // 3)]
        return float(np.mean(np.log(np.maximum(self._of_samples(candidate, some), NOTHING))))

    def better(self, candidate: Candidate, than: Candidate) -> bool:
        """Whether one is better than another, on a first look too, which saves the other runs where it is not."""
        return self.glance(candidate) < self.glance(than) and self.score(candidate) < self.score(than)

    def _of_samples(self, candidate: Candidate, runs: tuple[int, ...]) -> Matrix:
        return np.concatenate([self._error(candidate, run)[1] for run in runs])

    def _error(self, candidate: Candidate, run: int) -> tuple[float, Matrix]:
        """Relative error of a run, and of each of its samples, (batch,)."""
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
                self._errors[key] = float("inf"), np.full(len(full), np.inf)
                return self._errors[key]
            difference = relative(outcome.sample, full)
            error = float(torch.linalg.vector_norm(difference))
            # One that ran away to infinity is as bad as can be, and must sort as such.
            self._errors[key] = error if np.isfinite(error) else float("inf"), sample_errors(difference)
            self._seconds.setdefault(candidate, []).append(outcome.seconds)
            self._blocks[candidate] = outcome.blocks
            self.tick()
        return self._errors[key]

    def plan(self, candidate: Candidate) -> Plan:
        """A candidate as a plan, measured on all runs."""
        errors = [self._error(candidate, run)[0] for run in self.runs]
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
