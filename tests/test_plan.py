"""Schedules: every policy against lists written by hand, and ``plan`` against what a wrapped model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from zoo import DIT

import cachekit
from cachekit.policies import at_most, every, first, last, outside, skip_every, tail
from cachekit.preset import Preset

FIFTY = tuple(range(980, -1, -20))
TEN = tuple(range(900, -1, -100))


def marks(policy: Any, timesteps: Sequence[float], **options: Any) -> str:
    return "".join("#" if full else "." for full in cachekit.plan(policy, timesteps, **options))


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        # Three full steps at the start and the last 6 % of 50 (three); the period counts from the warm-up's last.
        ("skip-every-1", "##################################################"),
        ("skip-every-2", "###.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.####"),
        ("skip-every-3", "###..#..#..#..#..#..#..#..#..#..#..#..#..#..#..###"),
        ("skip-every-4", "###...#...#...#...#...#...#...#...#...#...#...####"),
        ("skip-every-6", "###.....#.....#.....#.....#.....#.....#.....#..###"),
        # Full while t >= 700, that is for 15 steps, and from the step after the first below 50 on.
        ("N2-700-50", "###############.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.##"),
        ("N3-700-50", "################..#..#..#..#..#..#..#..#..#..#..##"),
        ("N4-900-50", "#####...#...#...#...#...#...#...#...#...#...#...##"),
        ("N2-1000-20", "#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#.#."),
    ],
)
def test_presets_over_fifty_steps(policy: str, wanted: str) -> None:
    assert marks(policy, FIFTY) == wanted


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        # On few steps the tail is two, since 6 % of them would be less.
        ("skip-every-2", "###.#.#.##"),
        ("skip-every-3", "###..#..##"),
        ("every-1", "##########"),
        ("every-3", "#..#..#..#"),
        ("every-20", "#........."),
        ("first-0", "#........."),
        ("first-4", "####......"),
        ("first-40", "##########"),
        ("last-0", "#........."),
        ("last-3", "#......###"),
        ("tail", "#.......##"),
        ("tail-0.31", "#.....####"),
        ("at-most-0", "##########"),
        ("at-most-2", "#..#..#..#"),
        ("outside-700-300", "###.....##"),
        ("outside-700", "###......."),
        ("outside-0-0", "##########"),
        ("outside-1000", "#........."),
        ("every-2 & outside-500-0", "#.#.#....."),
        ("every-4 | at-most-1", "#.#.#.#.#."),
        ("every-3 | at-most-4 | last-1", "#..#..#..#"),
        ("(every-2 | every-3) & first-5", "#.###....."),
        ("every-2 | every-3 & first-5", "#.###.#.#."),
    ],
)
def test_policies_over_ten_steps(policy: str, wanted: str) -> None:
    assert marks(policy, TEN) == wanted


def test_at_most_counts_reuses_that_others_decided() -> None:
    # every(5) recomputes at 5, so that the count of at_most(3) starts anew there: 4, 5, 9, not 4, 8.
    assert marks(every(5) | at_most(3), TEN) == "#...##...#"


def test_without_a_range_the_lower_steps_are_known_by_their_number() -> None:
    assert marks(skip_every(2), TEN, range=None) == "###.#.#.##"
    assert marks(tail(0.06), TEN, range=None) == "#.......##"


def test_a_schedule_is_a_sequence_and_prints() -> None:
    schedule = cachekit.plan("every-2", [900, 500, 100])
    assert list(schedule) == [True, False, True]
    assert len(schedule) == 3
    assert (schedule[0], schedule[1], schedule[-1]) == (True, False, True)
    assert schedule.timesteps == (900.0, 500.0, 100.0)
    assert str(schedule) == "#.#  2 of 3 steps recomputed (#), the others reused (.)"


def test_tensors_of_a_scheduler_are_fine() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    assert cachekit.plan("every-3", scheduler.timesteps) == cachekit.plan("every-3", scheduler.timesteps.tolist())


def test_no_steps_no_schedule() -> None:
    assert len(cachekit.plan("skip-every-2", [])) == 0


def test_a_number_of_steps_is_no_timesteps() -> None:
    with pytest.raises(cachekit.ConfigError, match=r"timesteps=5: give the timestep of each step"):
        cachekit.plan("every-2", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["change-0.1", "every-2 & change-0.1", "change-0.1 | first-2"])
def test_what_looks_at_the_model_has_no_schedule(policy: str) -> None:
    with pytest.raises(cachekit.ConfigError, match="don't plan\\(\\) it without a model"):
        cachekit.plan(policy, TEN)


def test_a_policy_sees_each_step_and_what_was_decided() -> None:
    seen: list[tuple[int, float, int | None, float | None, float | None, int]] = []
    told: list[tuple[int, bool]] = []

    @dataclasses.dataclass(frozen=True)
    class odd(cachekit.Policy[int]):
        def init(self) -> int:
            return 0

        def decide(self, state: int, step: cachekit.Step) -> bool:
            seen.append((step.i, step.t, step.steps, step.range, step.previous_t, step.node))
            return state % 2 == 1

        def update(self, state: int, step: cachekit.Step, recomputed: bool) -> int:
            told.append((step.i, recomputed))
            return state + 1

    # A solver with two evaluations at one timestep: the node stands still at the second.
    assert list(cachekit.plan(odd(), [900, 700, 700, 500])) == [True, True, False, True]
    # The first step is decided by the session, since nothing is stored yet; the policy is told all the same.
    assert seen == [(1, 700, 4, 1000, 900, 1), (2, 700, 4, 1000, 700, 1), (3, 500, 4, 1000, 700, 2)]
    assert told == [(0, True), (1, True), (2, False), (3, True)]


timeless = st.recursive(
    st.one_of(
        st.integers(1, 6).map(every),
        st.integers(0, 6).map(first),
        st.integers(0, 6).map(last),
        st.integers(0, 6).map(at_most),
        st.floats(0, 0.5).map(tail),
        st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda w: outside(*w)),
    ),
    lambda inner: st.tuples(inner, st.booleans(), inner).map(lambda p: p[0] | p[2] if p[1] else p[0] & p[2]),
    max_leaves=4,
)


@given(policy=timeless, steps=st.integers(1, 12))
def test_a_wrapped_model_follows_the_plan(policy: cachekit.Policy[Any], steps: int) -> None:
    timesteps = [1000 - round(1000 * k / steps) for k in range(steps)]
    model = cachekit.wrap(DIT.build(), Preset(policy))
    conditioning = DIT.conditioning()
    with torch.no_grad(), model.cachekit.session(steps=steps):
        for t in timesteps:
            model(**DIT.inputs(t, conditioning=conditioning))
    handle: cachekit.Handle = model.cachekit
    assert [record.recomputed[1] for record in handle.stats.records] == list(cachekit.plan(policy, timesteps))
