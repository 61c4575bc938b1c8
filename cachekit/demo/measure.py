"""Run the rows of a comparison in turn, and measure them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cachekit
from cachekit.demo.kept import Kept, Ran
from cachekit.demo.quality import Quality, assess
from cachekit.demo.rows import Row
from cachekit.demo.target import Target
from cachekit.stats import Record, Stats


@dataclass
class Measured:
    """What was measured of a row; lists have one entry for each seed.

    Attributes:
        seconds: wall time of a run.
        samples: what came out, on the CPU.
        blocks_run, blocks_total: in one run; 0 where blocks were not counted (uncached rows that were never wrapped).
        bytes_peak: of stored tensors.
        records: of the last run's model calls.
        errors, fine_errors: norm of the difference over the norm of the uncached, or of the fine, samples (of the seeds that
            have a fine solution).
        rival_errors: of fewer steps of the same solver in the same wall time, for cached rows.
        quality: of all samples.
    """

    row: Row
    seconds: list[float] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    blocks_run: float = 0
    blocks_total: int = 0
    bytes_peak: int = 0
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    fine_errors: list[float] = field(default_factory=list)
    rival_errors: list[float] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)

    def add(self, ran: Ran) -> None:
        """One more seed's run."""
        self.seconds.append(ran.seconds)
        self.samples.append(ran.samples)
        self.blocks_run, self.blocks_total, self.bytes_peak = ran.blocks_run, ran.blocks_total, ran.bytes_peak
        self.records, self.notes = list(ran.records), list(ran.notes)

    @property
    def distance(self) -> float | None:
        """Frechet distance of all samples to real data, in the first kind of features."""
        return next((found.value for found in self.quality.frechet.values()), None)

    @property
    def time(self) -> float:
        """Median seconds of a run."""
        return float(np.median(self.seconds))

    @property
    def ratio(self) -> float | None:
        """Mean error over the mean error of fewer steps in the same time."""
        rival = float(np.mean(self.rival_errors)) if self.rival_errors else 0.0
        return float(np.mean(self.errors)) / rival if rival > 0 else None


def measure(
    tables: Sequence[tuple[Target, Sequence[Row]]],
    seeds: Sequence[int],
    fine: Sequence[Sequence[Tensor]],
    tick: Callable[[str], Any],
    kept: Kept,
) -> list[list[Measured]]:
    """Run every row of every target on every seed.

    All rows take turns within a seed, each time starting with another one, so that a machine whose speed drifts slows all
    alike, and times of different models may be compared.

    Args:
        tables: targets with their rows; the first row of each is the uncached one.
        seeds: of the noise.
        fine: for each target the fine solutions of the first seeds, or of none.
        tick: told each run's label when it is over.
        kept: where finished runs are kept.
    """
    found = [[Measured(row) for row in rows] for _, rows in tables]
    jobs = [(target, each) for (target, _), rows in zip(tables, found, strict=True) for each in rows]
    with torch.inference_mode():
        for k, seed in enumerate(seeds):
            turn = k * len(jobs) // len(seeds)
            for target, each in jobs[turn:] + jobs[:turn]:
                each.add(kept.run(target, each.row, seed, functools.partial(_run, target, each.row, seed)))
                tick(each.row.label)
    for (target, _), rows, solutions in zip(tables, found, fine, strict=True):
        cachekit.unwrap(target.model)
        _compare(target, rows, solutions)
    return found


def _run(target: Target, row: Row, seed: int) -> Ran:
    # every(1) is the uncached model bit for bit, but counts its blocks; timed runs of uncached rows go unwrapped.
    if row.kind == "cached":
        cachekit.wrap(target.model, row.policy, segments=row.segments, reuse=row.reuse)
    else:
        cachekit.unwrap(target.model)
    start = time.perf_counter()
    samples = row.solver.run(seed, row.steps).cpu()
    seconds = time.perf_counter() - start
    if row.kind != "cached":
        return Ran(seconds, samples)
    stats: Stats = target.model.cachekit.stats  # type: ignore[union-attr, assignment]
    counts = stats.blocks_run, stats.blocks_total, stats.bytes_peak
    return Ran(seconds, samples, *counts, tuple(sorted(stats.notes)), tuple(stats.records))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Norm of a - b over the norm of b, over all samples at once."""
    return float(torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()))


def _compare(target: Target, found: list[Measured], fine: Sequence[Tensor]) -> None:
    uncached = found[0]
    for each in found:
        each.errors = [relative_error(a, b) for a, b in zip(each.samples, uncached.samples, strict=True)]
        each.fine_errors = [relative_error(a, b) for a, b in zip(each.samples, fine, strict=False)]
    for each, quality in zip(found, assess(target, [torch.cat(each.samples) for each in found]), strict=True):
        each.quality = quality
    rivals = sorted((each for each in found if each.row.kind in ("uncached", "fewer")), key=lambda each: each.time)
    if len(rivals) < 2:
        return
    for each in found:
        if each.row.kind == "cached":
            # Linear between whole numbers of steps: at a given time the rival may take any share of one more.
            times = [rival.time for rival in rivals]
            each.rival_errors = [
                float(np.interp(each.time, times, [rival.errors[k] for rival in rivals])) for k in range(len(each.errors))
            ]
