"""What goes wrong leaves nothing behind, and what can't be cached is computed in full and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from drawing import NO_GLUE, runs
from hypothesis import assume, given
from hypothesis import strategies as st
from stack_runs import Run, advance, conditioning, equal, given_time, noise, tensor_of
from stacks import Stack, build, visits_of
from torch import Tensor
from wrapping import Case, cases, covered, stats

from cachekit import Policy, Step
from cachekit.policies import every


class Boom(Exception):
    """Raised in a block."""


class Interrupt(BaseException):
    """What a keyboard interrupt is to a sampling loop: no ``except Exception`` sees it."""


class Raising:
    """Puts an error in a block's way, before the block's own work is done."""

    def __init__(self, model: Stack, where: int, error: type[BaseException]) -> None:
        self.armed, self.error = False, error
        block = visits_of(model)[where % len(visits_of(model))]
        self.original: Callable[[Tensor], Tensor] = block.mix.forward
        block.mix.__dict__["forward"] = self

    def __call__(self, x: Tensor) -> Tensor:
        if self.armed:
            raise self.error
        return self.original(x)


def until_it_raises(case: Case, model: Stack, run: Run, raising: Raising, step: int) -> bool:
    """A generation whose given step raises, if it runs the block; whether it did."""
    with torch.no_grad(), case.session(model, run.times):
        steps = run.steps(model)
        for i in range(len(run.times)):
            raising.armed = i == step % len(run.times)
            try:
                next(steps)
            except raising.error:
                # Inside the session that it happened in, too.
                assert stats(model).bytes_held == 0
                return True
            finally:
                raising.armed = False
    return False


@given(cases(), runs, st.integers(0, 11), st.integers(0, 7), st.sampled_from((Boom, Interrupt)))
def test_an_exception_in_a_block_leaves_nothing_behind(case: Case, run: Run, step: int, where: int, error: Any) -> None:
    """No half-updated state: nothing is held, and the generation that follows equals the same one run alone."""
    model = case.wrap()
    assume(until_it_raises(case, model, run, Raising(model, where, error), step))
    assert equal(case.run(model, run), case.run(case.wrap(), run))


@given(cases(), runs, st.integers(0, 11), st.integers(0, 7))
def test_the_step_that_raised_may_be_tried_again(case: Case, run: Run, step: int, where: int) -> None:
    """Then it is a full one."""
    model = case.wrap()
    assume(until_it_raises(case, model, run, Raising(model, where, Boom), step))
    again = replace(run, times=run.times[step % len(run.times) :])
    assert torch.equal(case.run(model, again)[0], again.outputs(case.build())[0])


@dataclass(frozen=True)
class Broken(Policy[int]):
    """A user's policy that raises in its nth update; ``every(2)`` otherwise."""

    n: int

    def init(self) -> int:
        return 0

    def decide(self, state: int, step: Step) -> bool:
        return every(2).decide(None, step)

    def update(self, state: int, step: Step, recomputed: bool) -> int:
        if state == self.n:
            raise Boom
        return state + 1


@given(cases(), runs, st.integers(0, 5))
def test_a_policy_that_raises_leaves_nothing_behind(case: Case, run: Run, n: int) -> None:
    """Even after the blocks have run."""
    model = case.under(Broken(n)).wrap()
    asked = case.segments == "model" or bool(covered(case.segments, len(visits_of(model))))
    expected = case.under(every(2)).run(case.under(every(2)).wrap(), run)
    for _ in range(2):
        found = []
        with torch.no_grad(), case.session(model, run.times):
            try:
                for prediction in run.steps(model):
                    found.append(prediction)
            except Boom:
                assert stats(model).bytes_held == 0
        assert len(found) == (min(n, len(run.times)) if asked else len(run.times))
        assert equal(found, expected[: len(found)])


@given(cases(), runs)
def test_training_with_gradients_is_never_cached(case: Case, run: Run) -> None:
    """Losses and gradients are those of the unwrapped model; it is counted; a generation afterwards is as if run alone."""
    case = replace(case, spec=replace(case.spec, in_place=frozenset(), glue=NO_GLUE))
    model, plain = case.wrap().train(), case.build().train()
    losses = []
    for each in (model, plain):
        total = torch.stack([prediction.square().mean() for prediction in run.steps(each)]).sum()
        torch.autograd.backward(total)
        losses.append(total.detach())
    assert torch.equal(*losses)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or theirs.grad is None or torch.equal(ours.grad, theirs.grad)
    assert_counted_in_full(model, run)
    model.zero_grad(set_to_none=True)
    assert equal(case.run(model.eval(), run), case.run(case.wrap(), run))


@given(cases(), runs)
@pytest.mark.filterwarnings("ignore:cachekit computes every step in full")
def test_gradients_in_evaluation_mode_are_not_cached(case: Case, run: Run) -> None:
    """Guidance by gradients runs in evaluation mode: nothing is cached, so that no gradient is cut off, and that is counted."""
    case = replace(case, spec=replace(case.spec, in_place=frozenset(), glue=NO_GLUE))
    model = case.wrap()
    with torch.enable_grad(), case.session(model, run.times):
        found = [prediction.detach() for prediction in run.steps(model)]
    assert equal(found, run.outputs(case.build()))
    assert_counted_in_full(model, run)


@given(cases(), runs)
def test_frozen_weights_are_cached_with_gradients_on(case: Case, run: Run) -> None:
    """Where nothing asks for a gradient, none can be cut off, and a forgotten no_grad() costs nothing."""
    model = case.wrap(case.build().requires_grad_(False))
    with torch.enable_grad(), case.session(model, run.times):
        found = list(run.steps(model))
    # Frozen as well: torch takes other kernels for weights that ask for gradients, and rounds otherwise.
    assert equal(found, case.run(case.wrap(case.build().requires_grad_(False)), run))
    assert not stats(model).uncached


@given(cases(), runs)
def test_mixed_timesteps_are_never_cached(case: Case, run: Run) -> None:
    """A batch in which every sample has a time of its own is computed in full, and counted."""
    case = replace(case, spec=replace(case.spec, time="int"))
    model, plain = case.wrap(), case.build()
    x, y = noise(case.spec, run.batch, run.seed), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad():
        for t in run.times:
            mixed = given_time(case.spec, t, run.batch)
            mixed[0] += 1
            prediction = tensor_of(model(x, mixed, y))
            assert torch.equal(prediction, tensor_of(plain(x, mixed, y)))
            x = advance(x, prediction, 50)
    assert_counted_in_full(model, run)
    assert equal(case.run(model, run), case.run(case.wrap(), run))


def assert_counted_in_full(model: Stack, run: Run) -> None:
    """What stats say where nothing was cached."""
    assert sum(stats(model).uncached.values()) == len(run.times)
    assert len(stats(model).uncached) == 1
    assert stats(model).steps == len(run.times)
    assert stats(model).blocks_run == stats(model).blocks_total == len(run.times) * len(visits_of(build(model.spec)))
    assert stats(model).bytes_held == 0


@given(cases(), runs, st.integers(0, 11))
def test_an_uncached_step_interrupts_a_generation(case: Case, run: Run, step: int) -> None:
    """After one step with gradients or of mixed times nothing stored before it is reused: what follows starts anew."""
    case = replace(case, spec=replace(case.spec, time="int"))
    model, step = case.wrap(), step % len(run.times)
    x, y = noise(case.spec, run.batch, run.seed), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad(), case.session(model, run.times):
        for i, t in enumerate(run.times):
            time = given_time(case.spec, t, run.batch)
            time[0] += i == step
            prediction = tensor_of(model(x, time, y))
            if i in (step, step + 1):
                assert torch.equal(prediction, tensor_of(case.build()(x, time, y)))
            x = advance(x, prediction, 50)
    assert sum(stats(model).uncached.values()) == 1
