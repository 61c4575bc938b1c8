"""Generations of one prompt, where no conditioning tells them apart, and prompts that are written into one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import pytest
import torch
from cases import Case, Shape
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from running import SCHEDULE, assert_equal
from torch import Tensor, nn
from wrapping import handle, stats
from zoo import DIT, PIXART

import cachekit
from cachekit.lane import LEFT_OUT
from cachekit.policies import every, first

# Whatever is reused here was stored at the first step: values of another generation can't be missed.
HELD = first(1)
SHAPE = Shape(batch=1)
segments = pytest.mark.parametrize("segments", ["middle", "model"])


def steps(model: nn.Module, case: Case, times: Sequence[float], seed: int, prompt: Any = None) -> Iterator[Tensor]:
    """The predictions of a generation; its samples are a seed's, its prompt the same for all."""
    conditioning = case.conditioning(0, SHAPE) if prompt is None else prompt
    for t in times:
        yield case.output(model(**case.inputs(t, 1, seed, conditioning=conditioning, start=SCHEDULE[0]))).clone()


def alone(case: Case, times: Sequence[float], seed: int, policy: Any, where: str) -> list[Tensor]:
    """The same on a model of its own."""
    return list(steps(cachekit.wrap(case.build(), policy, segments=where), case, times, seed))


@torch.no_grad()
@segments
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_one_prompt_and_other_noise_at_the_timestep_of_the_abort(segments: str, stop: int) -> None:
    """Image to image, begun where another one was given up: no second evaluation of that step."""
    model = cachekit.wrap(DIT.build(), HELD, segments=segments)
    list(islice(steps(model, DIT, SCHEDULE, 1), stop))
    found = list(steps(model, DIT, SCHEDULE[stop - 1 :], 2))
    assert_equal(found, alone(DIT, SCHEDULE[stop - 1 :], 2, HELD, segments))


@torch.no_grad()
@segments
@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 3)])
def test_generations_of_one_prompt_that_take_turns(segments: str, seeds: tuple[int, ...]) -> None:
    """A batch that is sampled in parts, one after the other at each step: each part goes on with its own values."""
    model = cachekit.wrap(DIT.build(), HELD, segments=segments)
    found = list(zip(*(steps(model, DIT, SCHEDULE, seed) for seed in seeds), strict=True))
    for k, seed in enumerate(seeds):
        # Until another timestep shows that they take turns, all but the last look aborted at once; then they begin anew.
        begun = 0 if k == len(seeds) - 1 else 1
        assert_equal([step[k] for step in found][begun:], alone(DIT, SCHEDULE[begun:], seed, HELD, segments))


@torch.no_grad()
@segments
@pytest.mark.parametrize("times", [1, 2])
def test_begun_again_after_its_first_step_with_other_weights(segments: str, times: int) -> None:
    """Given up after one step, another LoRA, the same noise again: nothing of the old weights is left."""
    model = cachekit.wrap(DIT.build(), HELD, segments=segments)
    for _ in range(times):
        next(steps(model, DIT, SCHEDULE, 1))
    other = DIT.build(seed=5)
    model.load_state_dict(other.state_dict())
    found = list(steps(model, DIT, SCHEDULE, 1))
    seen = list(steps(other, DIT, SCHEDULE, 1))
    assert_equal(found[:2], seen[:2])
    expected = list(steps(cachekit.wrap(other, HELD, segments=segments), DIT, SCHEDULE[1:], 1))
    assert_equal(found[1:], expected)


@torch.no_grad()
@segments
@pytest.mark.parametrize("write", [lambda a, b: a.copy_(b), lambda a, b: a.zero_().add_(b)], ids=["copied", "added"])
def test_a_prompt_that_is_written_into_the_tensor_of_the_one_before(segments: str, write: Callable[..., Any]) -> None:
    """Prompts that change half-way in one static tensor begin a branch, as those in new tensors do."""
    first_prompt, second = PIXART.conditioning(0, SHAPE), PIXART.conditioning(1, SHAPE)
    found: list[list[Tensor]] = []
    for static in (True, False):
        model = cachekit.wrap(PIXART.build(), every(3), segments=segments)
        prompt = {**first_prompt, "encoder_hidden_states": first_prompt["encoder_hidden_states"].clone()}
        outputs: list[Tensor] = []
        for k, t in enumerate(SCHEDULE):
            if k == 2 and static:
                write(prompt["encoder_hidden_states"], second["encoder_hidden_states"])
            elif k == 2:
                prompt = {**prompt, "encoder_hidden_states": second["encoder_hidden_states"]}
            outputs += steps(model, PIXART, (t,), 1, prompt)
        found.append(outputs)
    assert_equal(found[0], found[1])


@torch.no_grad()
def test_a_static_tensor_with_the_same_prompt_in_it_goes_on() -> None:
    """Loops that copy their inputs into static tensors at each step are cached: values tell, not writes."""
    model, prompt = cachekit.wrap(PIXART.build(), every(3)), PIXART.conditioning(0, SHAPE)
    for t in SCHEDULE:
        prompt["encoder_hidden_states"].copy_(prompt["encoder_hidden_states"].clone())
        list(steps(model, PIXART, (t,), 1, prompt))
    assert [record.i for record in stats(model).records] == list(range(len(SCHEDULE)))


@torch.no_grad()
@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), HeunDiscreteScheduler()], ids=["ddim", "heun"])
def test_samplers_that_take_turns(scheduler: Any) -> None:
    """Real samplers, of one and of two evaluations a step: two seeds in turn are what each of them is alone."""
    scheduler.set_timesteps(8)
    times = scheduler.timesteps.tolist()

    def sampler(model: nn.Module, seed: int) -> Iterator[Tensor]:
        solver = type(scheduler).from_config(scheduler.config)
        solver.set_timesteps(8)
        x = DIT.sample(1000.0, seed, SHAPE) * solver.init_noise_sigma
        labels = DIT.conditioning(0, SHAPE)
        for t in solver.timesteps:
            prediction = model(solver.scale_model_input(x, t), timestep=t[None], **labels).sample[:, :4]
            yield prediction.clone()
            x = solver.step(prediction * 0.3, t, x).prev_sample

    model = cachekit.wrap(DIT.build(), every(2))
    turns = list(zip(sampler(model, 1), sampler(model, 2), strict=True))
    assert_equal([turn[1] for turn in turns], list(sampler(cachekit.wrap(DIT.build(), every(2)), 2)))
    assert len(times) == len(turns) and stats(model).blocks_run < 0.8 * stats(model).blocks_total


@torch.no_grad()
@segments
@pytest.mark.parametrize("away", [1, 2, 3])
def test_guidance_that_is_on_again(segments: str, away: int) -> None:
    """What was stored before a pause is not what a policy takes it for: it counts the steps of its branch alone."""
    model = cachekit.wrap(DIT.build(), HELD, segments=segments)
    found: list[Tensor] = []
    prompts = [DIT.conditioning(seed, SHAPE) for seed in (0, 2)]
    for k, t in enumerate(SCHEDULE):
        list(steps(model, DIT, (t,), 1, prompts[0]))
        if not 1 <= k <= away:
            found += steps(model, DIT, (t,), 1, prompts[1])
    back = SCHEDULE[away + 1 :]
    assert_equal(found[1:], list(steps(cachekit.wrap(DIT.build(), HELD, segments=segments), DIT, back, 1, prompts[1])))
    assert stats(model).dropped == {LEFT_OUT: 1} and stats(model).generations == 1


@torch.no_grad()
def test_prompts_in_turn_are_cached() -> None:
    """A branch that has every second step goes on as one of half the steps, once that has shown."""
    model = cachekit.wrap(DIT.build(), HELD)
    prompts = [DIT.conditioning(seed, SHAPE) for seed in (0, 2)]
    for k, t in enumerate(SCHEDULE):
        list(steps(model, DIT, (t,), 1, prompts[k % 2]))
    assert [all(record.recomputed) for record in stats(model).records] == [True] * 4 + [False] * (len(SCHEDULE) - 4)


@torch.no_grad()
@segments
@pytest.mark.parametrize("rows", [(0, 0, 2, 3), (0, 1, 3, 2), (0, 1, 2, 4)], ids=["drawn again", "swapped", "replaced"])
def test_rows_of_a_batch_that_hold_other_samples(segments: str, rows: tuple[int, ...]) -> None:
    """Particles of one prompt that are drawn again half-way: nobody gets what was stored for the one before."""
    model, shape = cachekit.wrap(DIT.build(), HELD, segments=segments), Shape(batch=5, scale=2)
    labels = torch.zeros(4, dtype=torch.long)

    def predict(model: Any, t: float, rows: tuple[int, ...]) -> Tensor:
        x = DIT.sample(t, 1, shape, SCHEDULE[0])[list(rows)]
        return DIT.output(model(x, timestep=torch.tensor([int(t)]), class_labels=labels)).clone()

    for t in SCHEDULE[:2]:
        predict(model, t, (0, 1, 2, 3))
    found = [predict(model, t, rows) for t in SCHEDULE[2:]]
    alone = cachekit.wrap(DIT.build(), HELD, segments=segments)
    assert_equal(found, [predict(alone, t, rows) for t in SCHEDULE[2:]])


@torch.no_grad()
@segments
@pytest.mark.parametrize("explicit", [False, True])
def test_steps_without_the_cache_are_missed(segments: str, explicit: bool) -> None:
    """Switched off for three steps, it begins with a full step; asked beside each cached step, it is none the wiser."""
    model, prompt = cachekit.wrap(DIT.build(), HELD, segments=segments), DIT.conditioning(0, SHAPE)
    plain = list(steps(DIT.build(), DIT, SCHEDULE, 1))
    expected = alone(DIT, SCHEDULE, 1, HELD, segments)

    def off(t: float) -> Tensor:
        with handle(model).disabled():
            return next(steps(model, DIT, (t,), 1, prompt))

    with handle(model).session() if explicit else nullcontext():
        found = [off(t) if 2 <= k < 5 else next(steps(model, DIT, (t,), 1, prompt)) for k, t in enumerate(SCHEDULE)]
    assert_equal(found[:2], expected[:2])
    assert_equal(found[2:6], plain[2:6])
    for before in (True, False):
        handle(model).reset()
        found = []
        with handle(model).session() if explicit else nullcontext():
            for t in SCHEDULE:
                if before:
                    off(t)
                found.append(next(steps(model, DIT, (t,), 1, prompt)))
                if not before:
                    off(t)
        assert_equal(found, expected)


@torch.no_grad()
def test_another_generation_without_the_cache_misses_nothing() -> None:
    """A whole one, inside ``disabled()`` after each step, from the same noise or another."""
    model, expected = cachekit.wrap(DIT.build(), HELD), alone(DIT, SCHEDULE, 1, HELD, "middle")
    for seed in (1, 2):
        found = []
        for prediction in steps(model, DIT, SCHEDULE, 1):
            found.append(prediction)
            with handle(model).disabled():
                list(steps(model, DIT, SCHEDULE, seed))
        assert_equal(found, expected)
