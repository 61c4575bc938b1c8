"""Comparing candidates: by what is typical of runs, and by no more of them than needed."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from calibrating import sampling, small
from hypothesis import given
from hypothesis import strategies as st

import cachekit
from cachekit import Forecast
from cachekit.candidates import Candidate
from cachekit.generations import Outcome, Sampler
from cachekit.trials import NOTHING, Trials

RUNS = 6


class Off:
    """Stands for ``Sampler``: what it is wrapped with says by how much each run is off."""

    def __init__(self, errors: dict[tuple[int, ...], list[float]]) -> None:
        self.errors, self.now, self.calls = errors, cast(Any, None), list[int]()

    def wrap(self, policy: Any, segments: Any = None, reuse: Any = None) -> None:
        self.now = None if segments == "model" else policy.recompute

    def call(self, run: int) -> Outcome:
        self.calls.append(run)
        off = 0.0 if self.now is None else self.errors[self.now][run]
        return Outcome(torch.tensor([1.0 + off], dtype=torch.float64), 1.0, 0.5)


@pytest.fixture(scope="module")
def calibration() -> cachekit.Calibration:
    model = small()
    return cachekit.calibrate(model, sampling(model), runs=2, sites=("middle",), probes=(1,), progress=False)


A, B = (Candidate("middle", Forecast(axis="grid"), recompute) for recompute in ((0, 2), (0, 3)))


def compared(calibration: cachekit.Calibration, a: list[float], b: list[float]) -> tuple[Trials, Off]:
    off = Off({A.recompute: a, B.recompute: b})
    return Trials(cast(Sampler, off), calibration, tuple(range(RUNS)), lambda: None), off


def test_one_run_does_not_decide(calibration: cachekit.Calibration) -> None:
    """Middle blocks of the Skip-DiT, 7 of 20 steps: one run has 0.074 and five have less than what is the same everywhere."""
    trials, _ = compared(calibration, [0.026, 0.025, 0.074, 0.028, 0.024, 0.027], [0.033] * RUNS)
    assert trials.better(A, B) and not trials.better(B, A)
    assert trials.error(A) > trials.error(B)


def test_a_first_look_saves_runs(calibration: cachekit.Calibration) -> None:
    """What is worse on a third of the runs is not run on the others."""
    trials, off = compared(calibration, [0.02] * RUNS, [0.03, 0.03, 0.0, 0.0, 0.0, 0.0])
    assert not trials.better(B, A) and sorted(off.calls) == [0, 0, 0, 1, 1, 1]


@given(
    a=st.lists(st.floats(1e-6, 10.0), min_size=RUNS, max_size=RUNS), b=st.lists(st.floats(1e-6, 10.0), min_size=RUNS, max_size=RUNS)
)
def test_scores(calibration: cachekit.Calibration, a: list[float], b: list[float]) -> None:
    """The logarithm of the geometric mean; which of two is the better one does not depend on a run's scale."""
    trials, _ = compared(calibration, a, b)
    # 1 + e is off by 2e-16 (1 + e), which is 2e-10 of an error of 1e-6 and more.
    assert trials.score(A) == pytest.approx(math.log(math.prod(a)) / RUNS, abs=1e-8)
    assert trials.glance(B) == trials.score(B, RUNS // 3)
    assert trials.better(A, B) == (trials.glance(A) < trials.glance(B) and trials.score(A) < trials.score(B))
    scaled, _ = compared(calibration, [2**k * e for k, e in enumerate(a)], [2**k * e for k, e in enumerate(b)])
    difference = trials.score(A) - trials.score(B)
    assert scaled.score(A) - scaled.score(B) == pytest.approx(difference, abs=1e-8)


def test_no_error_and_no_bound(calibration: cachekit.Calibration) -> None:
    """What is exact in one run is not infinitely good in all; what runs away in one is as bad as can be."""
    trials, _ = compared(calibration, [0.0] + [0.5] * 5, [0.01] * 5 + [math.nan])
    assert trials.score(A) == pytest.approx((math.log(NOTHING) + 5 * math.log(0.5)) / RUNS)
    assert trials.score(B) == math.inf
