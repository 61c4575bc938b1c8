"""Comparing candidates: by what is typical of samples, and by no more runs than needed."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from calibrating import sampling, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cachekit
from cachekit import Forecast
from cachekit.candidates import Candidate
from cachekit.generations import RESOLUTION, Outcome, Sampler, relative, typical
from cachekit.policies import every
from cachekit.trials import Trials

ERRORS = st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=8)


@given(errors=ERRORS, seed=st.integers(0, 1000))
def test_typical_errors(errors: list[float], seed: int) -> None:
    """The mean logarithm of each sample's error, whatever its direction, where all samples are of one size."""
    generator = torch.Generator().manual_seed(seed)
    full, off = (torch.nn.functional.normalize(torch.randn(2, len(errors), 24, generator=generator).double(), dim=-1)).unbind()
    found = full + off * torch.tensor(errors, dtype=torch.float64)[:, None]
    # x - full loses at most 2^-52 (1 + e) of an error e >= 1e-5: 1e-10 of it.
    assert typical(relative(found, full)) == pytest.approx(sum(map(math.log, errors)) / len(errors), abs=1e-8)


def test_samples_that_are_equal_or_ran_away() -> None:
    full = torch.eye(2, dtype=torch.float64)
    assert typical(relative(full, full)) == pytest.approx(math.log(RESOLUTION))
    for bad in (math.inf, math.nan):
        assert typical(relative(torch.tensor([[1.0, 0.0], [bad, 1.0]]), full)) == math.inf


class Off:
    """Stands for ``Sampler``: what it is wrapped with says by how much each sample of each run is off."""

    def __init__(self, errors: dict[tuple[int, ...], list[list[float]]]) -> None:
        self.errors, self.now, self.calls = errors, cast(Any, None), list[int]()

    def wrap(self, policy: Any, segments: Any = None, reuse: Any = None) -> None:
        self.now = None if segments == "model" else policy.recompute

    def call(self, run: int) -> Outcome:
        off = torch.zeros(4) if self.now is None else torch.tensor(self.errors[self.now][run])
        self.calls.append(run)
        return Outcome(torch.eye(4, dtype=torch.float64) * (1 + off.double()), 1.0, 0.5)


@pytest.fixture(scope="module")
def calibration() -> cachekit.Calibration:
    model = small()
    return cachekit.calibrate(model, sampling(model), runs=2, sites=("middle",), probes=(1,), progress=False)


def compared(calibration: cachekit.Calibration, errors: dict[tuple[int, ...], list[list[float]]], runs: int) -> tuple[Trials, Off]:
    off = Off(errors)
    return Trials(cast(Sampler, off), calibration, tuple(range(runs)), lambda: None), off


def candidate(*recompute: int) -> Candidate:
    return Candidate("middle", Forecast(axis="grid"), recompute)


def test_one_sample_does_not_decide(calibration: cachekit.Calibration) -> None:
    """A schedule that is better on all samples but one is the better one, though its mean error is larger."""
    good, bad = candidate(0, 2), candidate(0, 3)
    trials, _ = compared(calibration, {(0, 2): [[0.09, 0.02, 0.02, 0.02]] * 3, (0, 3): [[0.03] * 4] * 3}, 3)
    assert trials.better(good, bad) and not trials.better(bad, good)
    assert trials.error(good) > trials.error(bad)


def test_a_first_look_saves_runs(calibration: cachekit.Calibration) -> None:
    """What is worse on a third of the runs is not run on the others."""
    good, bad = candidate(0, 2), candidate(0, 3)
    trials, off = compared(calibration, {(0, 2): [[0.02] * 4] * 6, (0, 3): [[0.03] * 4] * 2 + [[0.0] * 4] * 4}, 6)
    assert not trials.better(bad, good) and sorted(off.calls) == [0, 0, 0, 1, 1, 1]


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_a_row_for_each_sample(shape: list[int], seed: int) -> None:
    """The first dimension is the batch; a sample of one dimension is one sample; tensors of one batch stand side by side."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows = outcome(x)
    assert rows.shape == ((shape[0], x[0].numel()) if x.ndim > 1 else (1, x.numel())) and rows.dtype == torch.float64
    assert torch.equal(rows.flatten(), x.double().flatten())
    two = outcome((x, 2 * x))
    assert torch.equal(two, torch.cat([rows, 2 * rows], 1))
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
