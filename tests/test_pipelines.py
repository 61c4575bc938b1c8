"""Whole diffusers pipelines run unmodified with a wrapped transformer: exact where they must be, and skipping what was planned."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from cases import relative
from pipelines import PAIRS, PIXART_PIPELINE, RECIPES, WAN_22_PIPELINE, WAN_PIPELINE, Recipe, for_each, transformers
from torch import Tensor, nn
from zoo import CASES

import cachekit
from cachekit.policies import every, first

STEPS = 8
# Wan 2.2's second transformer gets its first timestep twice: what begins there with another sample can only be guessed.
GUESSED = (WAN_22_PIPELINE, "heun")
CERTAIN = [pair for pair in PAIRS if pair != GUESSED]


def blocks_of(model: Any) -> tuple[int, int]:
    """How many blocks a transformer has, and how many of them the default segment covers."""
    case = next(case for case in CASES if case.name == type(model).__name__)
    return len(case.stack), len(case.stack) - 2 * case.unit


def by_branch(model: Any) -> dict[str, list[cachekit.Record]]:
    """The records of the current generation, by branch."""
    found: dict[str, list[cachekit.Record]] = defaultdict(list)
    for record in model.cachekit.stats.records:
        found[record.branch].append(record)
    return dict(found)


def shares(pipe: Any) -> list[list[float]]:
    """The timesteps of the last run that each of the pipeline's transformers got."""
    times = [float(t) for t in pipe.scheduler.timesteps]
    if len(transformers(pipe)) == 1:
        return [times]
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    return [[t for t in times if t >= boundary], [t for t in times if t < boundary]]


def assert_as_planned(recipe: Recipe, pipe: Any, policy: Any) -> None:
    """Every branch of every transformer recomputed exactly the planned steps, and nothing was dropped or left uncached."""
    for model, times in zip(transformers(pipe), shares(pipe), strict=True):
        planned = list(cachekit.plan(policy, times))
        blocks, covered = blocks_of(model)
        found = by_branch(model)
        assert set(found) == set(recipe.branches)
        for records in found.values():
            assert [record.i for record in records] == list(range(len(times)))
            assert [record.t for record in records] == pytest.approx(times)
            assert [sum(record.recomputed) for record in records] == [blocks if full else blocks - covered for full in planned]
        stats = model.cachekit.stats
        assert stats.generations == 1
        assert stats.steps == len(recipe.branches) * len(times)
        assert stats.blocks_total == stats.steps * blocks
        assert stats.blocks_run == stats.blocks_total - len(recipe.branches) * planned.count(False) * covered
        assert stats.blocks_run < stats.blocks_total
        assert not stats.uncached and not stats.dropped and not stats.notes


@for_each()
def test_every_1_is_bit_equal(recipe: Recipe, scheduler: str) -> None:
    expected = recipe.run(recipe.build(scheduler), STEPS)
    pipe = recipe.build(scheduler)
    for model in transformers(pipe):
        cachekit.wrap(model, every(1))
    assert torch.equal(recipe.run(pipe, STEPS), expected)
    for model in transformers(pipe):
        assert model.cachekit.stats.blocks_run == model.cachekit.stats.blocks_total > 0
        assert not model.cachekit.stats.uncached
        cachekit.unwrap(model)
    assert torch.equal(recipe.run(pipe, STEPS), expected)


@for_each(CERTAIN)
@pytest.mark.parametrize("policy", ["every-2", pytest.param("N2-900-300", marks=pytest.mark.slow)])
def test_each_branch_skips_what_was_planned(recipe: Recipe, scheduler: str, policy: str) -> None:
    pipe = recipe.build(scheduler)
    expected = recipe.run(pipe, STEPS)
    for model in transformers(pipe):
        cachekit.wrap(model, policy)
    found = recipe.run(pipe, STEPS)
    assert_as_planned(recipe, pipe, policy)
    assert 0 < relative(found, expected) < 0.3


@pytest.mark.slow
@for_each()
def test_the_preset_within_a_session_skips_what_was_planned(recipe: Recipe, scheduler: str) -> None:
    """Only a session knows the number of steps, as plan() does, and with it where the full tail begins."""
    pipe = recipe.build(scheduler)
    recipe.run(pipe, 16)
    with ExitStack() as sessions:
        for model, times in zip(transformers(pipe), shares(pipe), strict=True):
            cachekit.wrap(model, "skip-every-2")
            sessions.enter_context(model.cachekit.session(timesteps=times))
        recipe.run(pipe, 16)
    assert_as_planned(recipe, pipe, "skip-every-2")
    assert all(model.cachekit.stats.bytes_held == 0 for model in transformers(pipe))


@pytest.mark.slow
@for_each(CERTAIN)
def test_the_whole_prediction_as_a_site(recipe: Recipe, scheduler: str) -> None:
    pipe = recipe.build(scheduler)
    for model in transformers(pipe):
        cachekit.wrap(model, every(3), segments="model")
    recipe.run(pipe, STEPS)
    for model in transformers(pipe):
        for records in by_branch(model).values():
            assert [set(record.recomputed) for record in records] == [{i % 3 == 0} for i in range(len(records))]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=() if recipe in (PIXART_PIPELINE, WAN_22_PIPELINE) else pytest.mark.slow)
        for recipe in RECIPES
        if "heun" in recipe.schedulers
    ],
    ids=str,
)
def test_two_evaluations_at_one_timestep_are_two_steps_of_one_generation(recipe: Recipe) -> None:
    pipe = recipe.build("heun")
    recipe.run(pipe, STEPS)
    with ExitStack() as sessions:
        for model in transformers(pipe):
            cachekit.wrap(model, every(2))
            if (recipe, "heun") == GUESSED:
                sessions.enter_context(model.cachekit.session())
        recipe.run(pipe, STEPS)
    assert len(pipe.scheduler.timesteps) == 2 * STEPS - 1
    assert_as_planned(recipe, pipe, every(2))
    for model, times in zip(transformers(pipe), shares(pipe), strict=True):
        for records in by_branch(model).values():
            assert len(records) == len(times) > len(set(times))


def test_a_second_evaluation_at_the_very_first_timestep_is_taken_for_a_new_generation() -> None:
    """Without a session nothing tells it from a run that was aborted at once and begun anew: one more full step."""
    recipe = WAN_22_PIPELINE
    pipe = recipe.build("heun")
    for model in transformers(pipe):
        cachekit.wrap(model, every(2))
    recipe.run(pipe, STEPS)
    early, late = (model.cachekit.stats for model in transformers(pipe))
    assert (early.generations, late.generations) == (1, 2)
    assert late.steps == late.blocks_total // 6 == len(recipe.branches) * len(shares(pipe)[1])
    assert not late.uncached and not late.dropped


class Outputs:
    """Every prediction of a transformer, with the branch it was made for."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, defaultdict[str, list[Tensor]](list)
        self.hook = model.register_forward_hook(self)

    def __call__(self, model: nn.Module, args: Any, result: Any) -> None:
        self.seen[self.model.cachekit.stats.records[-1].branch].append(result[0].clone())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if len(recipe.branches) > 1], ids=str)
def test_a_branch_reuses_its_own_prediction_only(recipe: Recipe) -> None:
    pipe = recipe.build("euler")
    seen = [Outputs(cachekit.wrap(model, first(1), segments="model")) for model in transformers(pipe)]
    recipe.run(pipe, STEPS)
    for outputs in seen:
        cond, uncond = outputs.seen["cond"], outputs.seen["uncond"]
        assert len(cond) == len(uncond) > 1
        assert all(torch.equal(found, cond[0]) for found in cond)
        assert all(torch.equal(found, uncond[0]) for found in uncond)
        assert not torch.equal(cond[0], uncond[0])


def test_one_of_two_transformers_may_be_wrapped_alone() -> None:
    pipe = WAN_22_PIPELINE.build("euler")
    cachekit.wrap(pipe.transformer_2, every(2))
    WAN_22_PIPELINE.run(pipe, STEPS)
    early, late = shares(pipe)
    assert early and late
    stats = pipe.transformer_2.cachekit.stats
    assert stats.steps == 2 * len(late)
    assert stats.generations == 1
    assert stats.blocks_run < stats.blocks_total
    assert not hasattr(pipe.transformer, "cachekit")


def test_a_run_that_raises_within_a_branch_leaves_nothing_behind() -> None:
    pipe = WAN_PIPELINE.build("euler")
    model = cachekit.wrap(pipe.transformer, every(2))
    alone = WAN_PIPELINE.run(pipe, STEPS)

    def fail(block: nn.Module, args: Any) -> None:
        if len(model.cachekit.stats.records) == 5:
            raise ZeroDivisionError("uncond of the third step")

    hook = model.blocks[5].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="third step"):
        WAN_PIPELINE.run(pipe, STEPS)
    hook.remove()
    assert model.cachekit.stats.bytes_held == 0
    model.cachekit.reset()
    assert torch.equal(WAN_PIPELINE.run(pipe, STEPS), alone)
    assert_as_planned(WAN_PIPELINE, pipe, every(2))
