"""Several runs through one wrapped diffusers transformer: CFG as separate calls, generations in threads and asyncio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import Case
from running import TIMES, assert_equal, cases, generate
from torch import Tensor

import cachekit
from cachekit.policies import every


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrapped(case: Case) -> Any:
    """A model whose reuse depends on two stored steps, so that a value from elsewhere would show."""
    return cachekit.wrap(case.build(), every(2), reuse="taylor-1")


def guided(model: Any, case: Case, times: Sequence[float], names: Sequence[str | None]) -> list[list[Tensor]]:
    """One prediction a step for each of the branches, on the very same sample; ``names`` where they are given."""
    conditionings = [case.conditioning(seed) for seed in range(len(names))]
    found: list[list[Tensor]] = [[] for _ in names]
    for t in times:
        inputs = case.inputs(t, start=times[0], conditioning={})
        for name, conditioning, predictions in zip(names, conditionings, found, strict=True):
            if name is None:
                predictions.append(case.output(model(**inputs, **conditioning)).clone())
            else:
                with model.cachekit.branch(name):
                    predictions.append(case.output(model(**inputs, **conditioning)).clone())
    return found


@cases
@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None), pytest.param((None,) * 3, marks=pytest.mark.slow)], ids=str)
def test_separate_cfg_calls_never_see_each_others_store(case: Case, names: tuple[str | None, ...]) -> None:
    model = wrapped(case)
    found = guided(model, case, TIMES, names)
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for seed, predictions in enumerate(found):
        alone = wrapped(case)
        conditioning = case.conditioning(seed)
        expected = [case.output(alone(**case.inputs(t, start=TIMES[0], conditioning=conditioning))).clone() for t in TIMES]
        assert_equal(predictions, expected)
    stats = model.cachekit.stats
    assert stats.generations == 1
    assert [record.i for record in stats.records] == [i for i in range(len(TIMES)) for _ in names]
    assert [all(record.recomputed) for record in stats.records] == [i % 2 == 0 for i in range(len(TIMES)) for _ in names]


@cases
def test_branches_may_change_their_order_or_be_left_out(case: Case) -> None:
    """Guidance may be off at some steps; what tells the branches apart is their conditioning."""
    model = wrapped(case)
    calls = ((0, 1), (1, 0), (0,), (1, 0))
    conditionings = [case.conditioning(seed) for seed in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    for t, branches in zip(TIMES, calls, strict=True):
        inputs = case.inputs(t, start=TIMES[0], conditioning={})
        for branch in branches:
            found[branch].append(case.output(model(**inputs, **conditionings[branch])).clone())
    for branch, predictions in enumerate(found):
        times = [t for t, branches in zip(TIMES, calls, strict=True) if branch in branches]
        assert_equal(predictions, generate(wrapped(case), case, times, prompt=branch, start=TIMES[0]))
    assert model.cachekit.stats.generations == 1


@cases
def test_threads_keep_apart(case: Case) -> None:
    alone = [generate(wrapped(case), case, TIMES, seed) for seed in (0, 1)]
    model = wrapped(case)
    turns = threading.Barrier(2)

    def run(seed: int) -> list[Tensor]:
        conditioning = case.conditioning(seed)
        found = []
        # Gradients are recorded or not in each thread on its own.
        with torch.no_grad():
            for t in TIMES:
                turns.wait(timeout=60)
                inputs = case.inputs(t, seed=seed, conditioning=conditioning, start=TIMES[0])
                found.append(case.output(model(**inputs)).clone())
        return found

    with ThreadPoolExecutor(2) as pool:
        for predictions, expected in zip(pool.map(run, (0, 1)), alone, strict=True):
            assert_equal(predictions, expected)
    assert model.cachekit.stats.generations == 2
    assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total


@cases
def test_asyncio_tasks_keep_apart(case: Case) -> None:
    alone = [generate(wrapped(case), case, TIMES, seed) for seed in (0, 1, 2)]
    model = wrapped(case)

    async def run(seed: int) -> list[Tensor]:
        conditioning = case.conditioning(seed)
        found = []
        for t in TIMES:
            inputs = case.inputs(t, seed=seed, conditioning=conditioning, start=TIMES[0])
            found.append(case.output(model(**inputs)).clone())
            await asyncio.sleep(0)
        return found

    async def both() -> list[list[Tensor]]:
        # A generation in the parent task, whose context both children inherit.
        first = await run(0)
        return [first, *await asyncio.gather(run(1), run(2))]

    for predictions, expected in zip(asyncio.run(both()), alone, strict=True):
        assert_equal(predictions, expected)
    assert model.cachekit.stats.generations == 3
