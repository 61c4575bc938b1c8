"""Generations in several threads on one wrapped model: each equals the same run alone, and what it held goes with its thread."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from drawing import NO_GLUE, runs
from hypothesis import given
from hypothesis import strategies as st
from stack_blocks import StackSpec
from stack_runs import Run, equal, start
from stacks import Stack, blocks_of
from torch import Tensor
from turns import Turns
from wrapping import Case, cases, handle, identical, snapshot, stats

import cachekit
from cachekit import Policy, Stats, Step
from cachekit.policies import every

lanes = st.lists(runs, min_size=2, max_size=4)
choices = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def totals(found: list[Stats]) -> tuple[int, ...]:
    """What several stats come to."""
    return tuple(sum(getattr(s, name) for s in found) for name in ("steps", "generations", "blocks_run", "blocks_total"))


@given(cases().map(Case.wide), lanes, choices, st.booleans())
def test_interleaved_generations_equal_those_run_alone(case: Case, drawn: list[Run], order: list[int], deep: bool) -> None:
    """Step by step, or block by block so that calls of the model overlap; counts add up."""
    turns, model = Turns(order), case.wrap()
    if deep:
        turns.pause_in_blocks(model)
    found = turns.run([partial(_paused, turns, case, model, run) for run in drawn])
    alone = [case.wrap() for _ in drawn]
    for run, ours, other in zip(drawn, found, alone, strict=True):
        assert equal(ours, case.run(other, run))
    assert totals([stats(model)]) == totals([stats(other) for other in alone])


def _paused(turns: Turns, case: Case, model: Stack, run: Run) -> list[Tensor]:
    """One generation, with a pause after each step."""
    found = []
    with torch.no_grad(), case.session(model, run.times):
        for prediction in run.steps(model):
            found.append(prediction)
            turns.pause()
    return found


@given(cases().map(Case.wide), lanes, choices, runs)
def test_interleaved_tasks_equal_those_run_alone(case: Case, drawn: list[Run], order: list[int], parents: Run) -> None:
    """Tasks of one thread, started in the middle of their parent's own generation, whose context they copy."""
    model, pauses = case.wrap(), cycle(order)

    async def generation(run: Run, parent: bool = False) -> list[Tensor]:
        found, children = [], []
        with case.session(model, run.times):
            for prediction in run.steps(model):
                found.append(prediction)
                if parent and len(found) == 1:
                    children = [asyncio.create_task(generation(other)) for other in drawn]
                for _ in range(next(pauses)):
                    await asyncio.sleep(0)
        for run_alone, child in zip(drawn, children, strict=False):
            assert equal(await child, case.run(case.wrap(), run_alone))
        return found

    with torch.no_grad():
        found = asyncio.run(generation(parents, parent=True))
    assert equal(found, case.run(case.wrap(), parents))


class Fault(Exception):
    """Raised in one thread."""


@given(cases().map(Case.wide), lanes, choices, st.integers(0, 20))
def test_an_exception_in_one_thread_is_its_own(case: Case, drawn: list[Run], order: list[int], when: int) -> None:
    """The other generations go on, and keep what they hold."""
    turns, model = Turns(order), case.wrap()
    turns.pause_in_blocks(model)
    left = threading.local()

    def count_down(*_: Any) -> None:
        left.calls = getattr(left, "calls", -1) - 1
        if left.calls == 0:
            raise Fault

    def failing() -> list[Tensor]:
        left.calls = when + 1
        with contextlib.suppress(Fault):
            _paused(turns, case, model, drawn[0])
        return []

    for block in blocks_of(model):
        block.register_forward_pre_hook(count_down)
    jobs: list[Callable[[], list[Tensor]]] = [failing, *(partial(_paused, turns, case, model, run) for run in drawn[1:])]
    found = turns.run(jobs)
    for run, ours in zip(drawn[1:], found[1:], strict=True):
        assert equal(ours, case.run(case.wrap(), run))


@given(cases().map(Case.wide), lanes, choices, st.sampled_from(("disabled", "branch", "session", "uncached")))
def test_what_one_thread_enters_is_its_own(case: Case, drawn: list[Run], order: list[int], what: str) -> None:
    """disabled(), branch() and session() cover the thread that enters them, and an uncached call interrupts its own lane only."""
    turns, model = Turns(order), case.wrap()

    def other() -> list[Tensor]:
        contexts = {"disabled": handle(model).disabled(), "branch": handle(model).branch("b"), "session": handle(model).session()}
        run = drawn[0]
        with contexts.get(what, contextlib.nullcontext()):
            if what == "uncached":
                with torch.enable_grad(), pytest.warns(UserWarning, match="no_grad"):
                    for _ in run.steps(model):
                        turns.pause()
            _paused(turns, case, model, run)
        return []

    jobs: list[Callable[[], list[Tensor]]] = [other, *(partial(_paused, turns, case, model, run) for run in drawn[1:])]
    found = turns.run(jobs)
    for run, ours in zip(drawn[1:], found[1:], strict=True):
        assert equal(ours, case.run(case.wrap(), run))


@given(cases().map(Case.wide), lanes, choices, st.booleans())
def test_copies_of_a_wrapped_model_in_threads(case: Case, drawn: list[Run], order: list[int], deep: bool) -> None:
    """Each thread copies the model that the others are using, and samples with its copy and with the model itself."""
    turns, model = Turns(order), case.wrap()

    def job(run: Run) -> list[list[Tensor]]:
        turns.pause()
        twin = copy.deepcopy(model)
        if deep:
            turns.pause_in_blocks(twin)
        return [_paused(turns, case, twin, run), _paused(turns, case, model, run)]

    for run, found in zip(drawn, turns.run([partial(job, run) for run in drawn]), strict=True):
        expected = case.run(case.wrap(), run)
        assert equal(found[0], expected) and equal(found[1], expected)


@given(cases().map(Case.wide), lanes, choices, st.integers(0, 8), st.booleans())
def test_unwrapped_while_others_sample(case: Case, drawn: list[Run], order: list[int], after: int, deep: bool) -> None:
    """From then on their steps are full ones, and nothing is left behind, even where a call was under way."""
    turns, model = Turns(order), case.build()
    if deep:
        turns.pause_in_blocks(model)
    before = snapshot(model)
    case.wrap(model)

    def remove() -> list[Tensor]:
        for _ in range(after):
            turns.pause()
        cachekit.unwrap(model)
        return []

    implicit = replace(case, explicit=False)
    jobs: list[Callable[[], list[Tensor]]] = [remove, *(partial(_paused, turns, implicit, model, run) for run in drawn)]
    turns.run(jobs)
    assert identical(before, snapshot(model))
    assert equal(drawn[0].outputs(model), drawn[0].outputs(case.build()))


@given(cases().map(Case.wide), runs)
def test_a_thread_for_each_step_is_full_on_every_step(case: Case, run: Run) -> None:
    """What another thread stored is not taken, even where it would fit."""
    model, found = replace(case, explicit=False).wrap(), []
    steps = run.steps(model)

    def step() -> Tensor:
        with torch.no_grad():
            return next(steps)

    for _ in run.times:
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(step).result())
    assert equal(found, run.outputs(case.build()))


def test_many_threads() -> None:
    """Fifty generations at once, each on its own schedule."""
    spec = StackSpec(depth=4, order=(0, 1, 2, 3), glue=NO_GLUE)
    case = Case(spec, "every-3", None, "taylor-1", False)
    model, turns = case.wrap(), Turns([7, 3, 11, 0, 5])
    drawn = [Run((900.0, 800.0 - k, 700.0 - 2 * k, 500.0, 100.0 + k), seed=k) for k in range(50)]
    for run, found in zip(drawn, turns.run([partial(_paused, turns, case, model, run) for run in drawn]), strict=True):
        assert equal(found, case.run(case.wrap(), run))
    assert stats(model).generations == 50


@contextlib.contextmanager
def _restless() -> Iterator[None]:
    """Threads are switched as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("segments", ["middle", "model"])
def test_counts_add_up_in_threads_that_run_freely(segments: str) -> None:
    """Nobody takes turns here: whatever the interpreter makes of it, no count is lost and no result changes."""
    spec = StackSpec(depth=4, order=(0, 1, 2, 3), width=4, tokens=4, glue=NO_GLUE)
    case = Case(spec, "every-3", segments, "taylor-1", False)
    model = case.wrap()
    drawn = [Run(tuple(float(t) for t in range(999 - k, 0, -9)), seed=k) for k in range(4)]
    with _restless(), ThreadPoolExecutor(4) as pool:
        barrier = threading.Barrier(4)

        def job(run: Run) -> list[Tensor]:
            barrier.wait()
            return case.run(model, run)

        found = list(pool.map(job, drawn))
    alone = [case.wrap() for _ in drawn]
    for run, ours, other in zip(drawn, found, alone, strict=True):
        assert equal(ours, case.run(other, run))
    assert totals([stats(model)]) == totals([stats(other) for other in alone])


class Token:
    """A policy's state, which can be watched."""


@dataclass(frozen=True)
class Tracked(Policy[Token]):
    """``every(2)``, with a state in each branch that shows whether the branch is alive."""

    seen: list[weakref.ref[Token]] = field(default_factory=list, hash=False)

    def init(self) -> Token:
        token = Token()
        self.seen.append(weakref.ref(token))
        return token

    def decide(self, state: Token, step: Step) -> bool:
        return every(2).decide(None, step)


@given(cases().map(Case.implicit), lanes, runs, st.integers(1, 6))
def test_what_a_thread_held_goes_with_it(case: Case, drawn: list[Run], run: Run, steps: int) -> None:
    """Generations given up in threads that ended: their states are gone, and the next step counts what is left."""
    policy = Tracked()
    model = case.under(policy).wrap()
    threads = [threading.Thread(target=start, args=(model, other, steps)) for other in drawn]
    for thread in threads:
        thread.start()
        thread.join()
    peak = stats(model).bytes_held
    states = list(policy.seen)
    assert all(state() is not None for state in states)
    del thread, threads
    gc.collect()
    assert all(state() is None for state in states)
    alone = case.under(every(2)).wrap()
    start(model, run, 1)
    start(alone, run, 1)
    assert stats(model).bytes_held == stats(alone).bytes_held
    assert stats(model).bytes_peak >= max(peak, stats(model).bytes_held)
