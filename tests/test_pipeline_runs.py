"""A pipeline's run with a wrapped transformer is the same whatever ran before it: another one, a larger one, an aborted one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipelines import FLUX_TRUE_CFG_PIPELINE, RECIPES, WAN_22_PIPELINE, Recipe, for_each, transformers

import cachekit

STEPS = 5
TAYLOR: dict[str, Any] = {"policy": "every-2", "reuse": "taylor-1"}
OTHERS: tuple[dict[str, Any], ...] = (
    {"policy": "every-2", "segments": "model", "reuse": "taylor-2"},
    {"policy": "change-0.2 & every-3 | every-4", "reuse": "residual"},
)
# No generation that was begun at one resolution or schedule may be seen in another.
OTHER_RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("the same", {}),
    ("another seed", {"seed": 1}),
    ("fewer steps", {"steps": 3}),
    ("more steps", {"steps": 7}),
)


class Aborted(Exception):
    """Raised in the middle of a run."""


@contextmanager
def stopping(pipe: Any, after: int) -> Iterator[dict[str, Any]]:
    """Arguments with which a run raises after so many steps: from its callback, or from its sampler where it has none."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    calls = 0

    def stop(*arguments: Any, **named: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Aborted
        return {}

    if "callback_on_step_end" in parameters:
        yield {"callback_on_step_end": stop}
    elif "callback" in parameters:
        yield {"callback": stop}
    else:
        step = pipe.scheduler.step
        # The scheduler's own state ends with the run: every run sets its timesteps anew.
        pipe.scheduler.step = lambda *arguments, **named: (stop(), step(*arguments, **named))[1]
        try:
            yield {}
        finally:
            del pipe.scheduler.step


def wrapped(recipe: Recipe, scheduler: str, arguments: dict[str, Any]) -> Any:
    pipe = recipe.build(scheduler)
    for model in transformers(pipe):
        cachekit.wrap(model, **arguments)
    return pipe


def compare_after_others(recipe: Recipe, scheduler: str, arguments: dict[str, Any]) -> None:
    """A run is the same after others of other seeds, lengths and sizes through the same wrapped model."""
    alone = recipe.run(wrapped(recipe, scheduler, arguments), STEPS)
    pipe = wrapped(recipe, scheduler, arguments)
    for name, other in OTHER_RUNS:
        recipe.run(pipe, **{"steps": STEPS, **other})
        assert torch.equal(recipe.run(pipe, STEPS), alone), f"after {name}"
    assert recipe.run(pipe, STEPS, **recipe.larger).shape != alone.shape
    assert torch.equal(recipe.run(pipe, STEPS), alone), "after another size"
    for model in transformers(pipe):
        assert not model.cachekit.stats.uncached
        assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total


def compare_after_aborted(recipe: Recipe, scheduler: str, arguments: dict[str, Any]) -> None:
    """A run is the same after aborted ones, those with the same start among them: they look most like a continuation."""
    alone = recipe.run(wrapped(recipe, scheduler, arguments), STEPS)
    pipe = wrapped(recipe, scheduler, arguments)
    for after, seed in ((1, 0), (1, 1), (3, 0), (4, 1)):
        with stopping(pipe, after) as callback, pytest.raises(Aborted):
            recipe.run(pipe, STEPS, seed, **callback)
        assert torch.equal(recipe.run(pipe, STEPS), alone), f"after {after} steps of seed {seed}"


@pytest.mark.slow
@for_each()
def test_a_run_is_the_same_after_any_other(recipe: Recipe, scheduler: str) -> None:
    compare_after_others(recipe, scheduler, TAYLOR)


@for_each()
def test_a_run_is_the_same_after_an_aborted_one(recipe: Recipe, scheduler: str) -> None:
    compare_after_aborted(recipe, scheduler, TAYLOR)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_other_policies(recipe: Recipe) -> None:
    """Each pipeline with one of them, in turns."""
    arguments = OTHERS[RECIPES.index(recipe) % len(OTHERS)]
    scheduler = next(iter(recipe.schedulers))
    compare_after_others(recipe, scheduler, arguments)
    compare_after_aborted(recipe, scheduler, arguments)


@pytest.mark.parametrize("recipe", [FLUX_TRUE_CFG_PIPELINE, WAN_22_PIPELINE], ids=str)
def test_a_run_without_cfg_in_between(recipe: Recipe) -> None:
    """Then the second branch is not called, and the first goes on as ever."""
    alone = recipe.run(wrapped(recipe, "euler", TAYLOR), STEPS)
    pipe = wrapped(recipe, "euler", TAYLOR)
    recipe.run(pipe, STEPS)
    unguided: dict[str, Any] = {"true_cfg_scale" if recipe is FLUX_TRUE_CFG_PIPELINE else "guidance_scale": 1.0}
    recipe.run(pipe, STEPS, **unguided)
    assert {record.branch for model in transformers(pipe) for record in model.cachekit.stats.records} == {"cond"}
    assert torch.equal(recipe.run(pipe, STEPS), alone)
