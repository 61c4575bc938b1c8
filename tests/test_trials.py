"""Comparing candidates: by errors of samples, of which no batch's worst outweighs the others, and by no more runs than needed."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from calibrating import sampling, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachekit
from cachekit import Forecast
from cachekit.candidates import Candidate
from cachekit.generations import Outcome, Sampler, relative, sample_errors
from cachekit.policies import every
from cachekit.trials import NOTHING, Trials

RUNS, BATCH = 6, 4
Errors = list[list[float]]


@given(errors=st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_errors_of_samples(errors: list[float], seed: int) -> None:
    """Whatever their direction, where all samples are of one size; their mean square is the batch's error squared."""
    generator = torch.Generator().manual_seed(seed)
    full, off = torch.nn.functional.normalize(torch.randn(2, len(errors), 24, generator=generator).double(), dim=-1).unbind()
    difference = relative(full + off * torch.tensor(errors, dtype=torch.float64)[:, None], full)
    # x - full loses at most 2^-52 (1 + e) of an error e >= 1e-5: 1e-10 of it.
    np.testing.assert_allclose(sample_errors(difference), errors, rtol=1e-8)
    assert np.mean(sample_errors(difference) ** 2) == pytest.approx(float(difference.norm()) ** 2)


def test_samples_that_ran_away() -> None:
    full = torch.eye(2, dtype=torch.float64)
    for bad in (math.inf, -math.inf, math.nan):
        assert sample_errors(relative(torch.tensor([[1.0, 0.0], [bad, 1.0]]), full)).tolist() == [0.0, math.inf]


class Off:
    """Stands for ``Sampler``: what it is wrapped with says by how much each sample of each run is off."""

    def __init__(self, errors: dict[tuple[int, ...], Errors]) -> None:
        self.errors, self.now, self.calls = errors, cast(Any, None), list[int]()

    def wrap(self, policy: Any, segments: Any = None, reuse: Any = None) -> None:
        self.now = None if segments == "model" else policy.recompute

    def call(self, run: int) -> Outcome:
        self.calls.append(run)
        off = [0.0] * BATCH if self.now is None else self.errors[self.now][run]
        return Outcome(torch.diag(1 + torch.tensor(off, dtype=torch.float64)), 1.0, 0.5)


@pytest.fixture(scope="module")
def calibration() -> cachekit.Calibration:
    model = small()
    return cachekit.calibrate(model, sampling(model), runs=2, sites=("middle",), probes=(1,), progress=False)


A, B = (Candidate("middle", Forecast(axis="grid"), recompute) for recompute in ((0, 2), (0, 3)))


def compared(calibration: cachekit.Calibration, a: Errors, b: Errors) -> tuple[Trials, Off]:
    off = Off({A.recompute: a, B.recompute: b})
    return Trials(cast(Sampler, off), calibration, tuple(range(RUNS)), lambda: None), off


def test_one_sample_does_not_decide(calibration: cachekit.Calibration) -> None:
    """One of 24 is far off and the others are better: the better schedule, though the batches' mean error says otherwise."""
    trials, _ = compared(calibration, [[0.14, *[0.02] * 3], *[[0.02] * 4] * 5], [[0.026] * 4] * RUNS)
    assert trials.better(A, B) and not trials.better(B, A)
    assert trials.error(A) > trials.error(B)


def test_tails_do(calibration: cachekit.Calibration) -> None:
    """Where in every batch one is far off, the schedule that looks better on a typical sample is not preferred."""
    trials, _ = compared(calibration, [[0.3, *[0.09] * 3]] * RUNS, [[0.14, *[0.125] * 3]] * RUNS)
    assert trials.glance(A) < trials.glance(B) and not trials.better(A, B) and not trials.better(B, A)


def test_a_first_look_saves_runs(calibration: cachekit.Calibration) -> None:
    """What is worse on a third of the runs is not run on the others."""
    trials, off = compared(calibration, [[0.02] * 4] * RUNS, [*[[0.03] * 4] * 2, *[[0.0] * 4] * 4])
    assert not trials.better(B, A) and sorted(off.calls) == [0, 0, 0, 1, 1, 1]


def test_what_is_exact_or_runs_away(calibration: cachekit.Calibration) -> None:
    """What is exact in one sample is not infinitely good in all; what runs away in one is as bad as can be."""
    trials, _ = compared(calibration, [[0.0, *[0.5] * 3]] * RUNS, [*[[0.01] * 4] * 5, [0.01, math.nan, 0.01, 0.01]])
    assert trials.glance(A) == pytest.approx((math.log(NOTHING) + 3 * math.log(0.5)) / 4)
    assert trials.score(A) == pytest.approx(0.375) and trials.score(B) == trials.error(B) == math.inf


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_a_row_for_each_sample(shape: list[int], seed: int) -> None:
    """The first dimension is the batch; a sample of one dimension is one sample; tensors of one batch stand side by side."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows = outcome(x)
    assert rows.shape == ((shape[0], x[0].numel()) if x.ndim > 1 else (1, x.numel())) and rows.dtype == torch.float64
    assert torch.equal(rows.flatten(), x.double().flatten())
    assert torch.equal(outcome((x, 2 * x)).flatten(), torch.cat([rows, 2 * rows], 1).flatten())
    assert outcome((x, x.new_ones(shape[0] + 1, 2))).shape == (1, x.numel() + 2 * (shape[0] + 1))


def outcome(sample: Any) -> Tensor:
    """What ``Sampler`` makes of a sample that a function returns after one generation, here of one step."""
    model = small()

    def one_step(run: int) -> Any:
        model(torch.zeros(1, 4, 8, 8), timestep=torch.zeros(1), class_labels=torch.tensor([0]))
        return sample

    sampler = Sampler(model, one_step)
    sampler.wrap(every(1), "model")
    return sampler.call(0).sample
