"""A generation knows nothing of those before it, whether they ended, were given up, or were of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from drawing import NO_GLUE, STRINGS, dtypes, heun, policies, runs, schedules
from hypothesis import assume, given
from hypothesis import strategies as st
from stack_blocks import StackSpec
from stack_runs import Run, conditioning, equal, given_time, samples, start, tensor_of
from stacks import Stack, build
from torch import Tensor
from wrapping import Case, cases, handle, stats

import cachekit
from cachekit.policies import every


@dataclass(frozen=True)
class Before:
    """What came before: a run, and after how many steps it was given up; the model perhaps in double precision meanwhile."""

    run: Run
    steps: int
    widened: bool


@st.composite
def befores(draw: Any) -> Before:
    """Another batch size, resolution, dtype, a longer or shorter schedule; to its end or not."""
    seed, batch, tokens = st.integers(20, 29), st.sampled_from((4, 5, 8)), st.sampled_from((None, 4, 8))
    run = Run(draw(schedules()), draw(seed), draw(batch), draw(tokens), draw(dtypes))
    return Before(run, draw(st.integers(0, len(run.times))), draw(st.booleans()))


@given(cases().map(Case.implicit), st.lists(befores(), min_size=1, max_size=3), runs)
def test_it_is_the_same_whatever_came_before(case: Case, earlier: list[Before], run: Run) -> None:
    """Aborted ones, other batch sizes, resolutions and dtypes, longer and shorter schedules: as if run alone."""
    model = case.wrap()
    for before in earlier:
        start(model.double() if before.widened else model, before.run, before.steps)
        model.float()
    assert equal(case.run(model, run), case.run(case.wrap(), run))


@given(cases().map(Case.implicit), runs, st.integers(0, 11), st.booleans())
def test_the_same_noise_again_is_a_new_generation(case: Case, run: Run, stop: int, later: bool) -> None:
    """Given up and started again, from the first timestep or (fewer steps, image to image) from a later one."""
    model = case.wrap()
    start(model, run, stop % len(run.times))
    again = replace(run, times=run.times[1:]) if later else run
    assert equal(case.run(model, again), case.run(case.wrap(), again))


@given(cases().map(Case.implicit), runs, st.integers(1, 4))
def test_other_noise_at_the_timestep_of_the_abort_is_a_new_generation(case: Case, run: Run, stop: int) -> None:
    """Time stands still there, and alone does not tell."""
    model = case.wrap()
    stop = min(stop, len(run.times))
    start(model, run, stop)
    after = Run(run.times[stop - 1 :], seed=run.seed + 40, batch=run.batch)
    assert equal(case.run(model, after), case.run(case.wrap(), after))


@given(cases().map(Case.implicit), runs)
def test_a_session_inside_a_generation_leaves_it_alone(case: Case, run: Run) -> None:
    """Another generation sampled between two steps, in a session of its own."""
    model, other, found = case.wrap(), replace(run, seed=run.seed + 70), []
    expected = replace(case, explicit=True).run(case.wrap(), other)
    with torch.no_grad():
        for prediction in run.steps(model):
            found.append(prediction)
            with handle(model).session(timesteps=other.times):
                assert equal(other.outputs(model), expected)
    assert equal(found, case.run(case.wrap(), run))


@given(cases(), runs)
def test_nothing_is_held_after_a_session(case: Case, run: Run) -> None:
    """Whatever was stored in it goes with it; ``reset`` does the same without one."""
    model = case.wrap()
    with handle(model).session(steps=len(run.times)):
        run.outputs(model)
    assert stats(model).bytes_held == 0
    run.outputs(model)
    handle(model).reset()
    assert stats(model).bytes_held == 0 and stats(model).generations == 0


@given(cases(), runs)
def test_two_evaluations_a_step_are_one_generation(case: Case, run: Run) -> None:
    """Heun's second evaluation is at the same timestep and on another sample: a further step, with or without a session."""
    case = case.wide()
    run = replace(run, times=heun(run.times))
    model, named = case.wrap(), case.wrap()
    xs, y = samples(case.build(), run), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad(), case.session(model, run.times):
        found = list(_on(model, run, xs, y))
    with torch.no_grad(), case.session(named, run.times), handle(named).branch("only"):
        expected = list(_on(named, run, xs, y))
    assert equal(found, expected)
    assert [record.i for record in stats(model).records] == list(range(len(run.times)))
    assert stats(model).generations == 1


def _on(model: Stack, run: Run, xs: list[Tensor], y: Tensor) -> Iterator[Tensor]:
    for t, x in zip(run.times, xs, strict=True):
        yield tensor_of(model(x, given_time(model.spec, t, run.batch), y)).clone()


@given(cases().map(Case.implicit), policies(), runs)
def test_rising_time_is_read_as_such(case: Case, policy: Any, run: Run) -> None:
    """A model whose time rises, with no adapter that says so: all steps belong to one generation."""
    assume(not isinstance(case.policy, str))
    model = case.under(policy).wrap()
    case.run(model, replace(run, times=run.times[::-1]))
    assert [record.i for record in stats(model).records] == list(range(len(run.times)))
    assert stats(model).generations == 1


@given(cases().map(Case.implicit), policies() | st.sampled_from(STRINGS), runs, st.sampled_from((1.0, 1024.0)))
def test_an_adapter_turns_rising_time(case: Case, policy: Any, run: Run, scale: float) -> None:
    """Of a model that takes (1000 - t) / scale, an adapter that says so makes the schedule that the policy has in t itself."""
    case = replace(case, spec=replace(case.spec, time="float")).under(policy)
    model = case.wrap(adapter=cachekit.Adapter(rising=True, range=1000, scale=scale))
    plain = case.wrap(adapter=cachekit.Adapter(range=1000))
    # A power of two, so that nothing is rounded.
    case.run(model, replace(run, times=tuple((1000 - t) / scale for t in run.times)))
    case.run(plain, run)
    assert stats(model).records == stats(plain).records
    assert [record.t for record in stats(model).records] == list(run.times)


@pytest.mark.parametrize("steps", [20, 50, 100, 250])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_fine_schedules_are_one_generation(steps: int, scale: float) -> None:
    """Along DDIM's steps of the linear schedule the first samples hardly turn: data of this scale under full noise."""
    model = cachekit.wrap(build(StackSpec(depth=4, order=(0, 1, 2, 3), tokens=64, glue=NO_GLUE)), every(2))
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    generator = torch.Generator().manual_seed(0)
    data, eps = (torch.randn(2, 64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    times = list(range(999, -1, -(1000 // steps)))[:12]
    with torch.no_grad():
        for t in times:
            x = (kept[t].sqrt() * data * scale + (1 - kept[t]).sqrt() * eps).float()
            model(x, torch.full((2,), t), torch.zeros(2, dtype=torch.int64))
    assert [record.i for record in stats(model).records] == list(range(len(times)))
    assert stats(model).generations == 1
