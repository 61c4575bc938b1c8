"""The model stays what it was: wrap and unwrap, copies, keys, moves between dtypes and devices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawing import policies, reuses, runs
from hypothesis import given
from hypothesis import strategies as st
from stack_runs import Run, conditioning, equal, noise, start, tensor_of
from stacks import Stack, blocks_of, calls
from wrapping import Case, cases, handle, identical, snapshot, stats

import cachekit

DUPLICATES: dict[str, Callable[[Stack], Stack]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@given(cases(), runs, st.booleans(), st.integers(0, 12))
def test_unwrap_restores_every_dict(case: Case, run: Run, shadowed: bool, steps: int) -> None:
    """Also with a ``forward`` in a block's ``__dict__``, as some models and accelerate put one there; keys never change."""
    model = case.build()
    if shadowed:
        block = blocks_of(model)[0]
        block.__dict__["forward"] = block.forward
        block.__dict__["later"] = "entry"
    before, keys = snapshot(model), list(model.state_dict())
    case.wrap(model)
    assert list(model.state_dict()) == keys
    start(model, run, steps)
    assert list(model.state_dict()) == keys
    assert cachekit.unwrap(model) is model
    assert identical(before, snapshot(model))
    assert equal(run.outputs(model), run.outputs(case.build()))
    assert cachekit.unwrap(model) is model


@given(cases(), runs, st.integers(0, 12), st.booleans())
def test_wrap_unwrap_wrap_equals_wrap(case: Case, run: Run, steps: int, removed: bool) -> None:
    """In the middle of a generation too; and so does wrap on a wrapped model, which replaces what was there."""
    once = case.run(case.wrap(), run)
    model = case.wrap()
    start(model, run, steps)
    if removed:
        handle(model).remove()
    else:
        cachekit.unwrap(model)
    assert "cachekit" not in model.__dict__
    assert equal(case.run(case.wrap(model), run), once)
    assert equal(case.run(case.wrap(model), run), once)


@given(cases(), policies(), reuses(), runs, st.integers(0, 12))
def test_wrapping_again_replaces_the_policy(case: Case, policy: Any, reuse: Any, run: Run, steps: int) -> None:
    """Nothing of the wrap before is left: neither stored values nor statistics, and one unwrap takes all out."""
    model = case.build()
    before = snapshot(model)
    earlier = handle(cachekit.wrap(model, policy, segments="all", reuse=reuse))
    start(model, run, steps)
    assert equal(case.run(case.wrap(model), run), case.run(case.wrap(), run))
    assert stats(model).steps == len(run.times)
    assert earlier.stats.bytes_held == 0
    cachekit.unwrap(model)
    assert identical(before, snapshot(model))


def halved(model: Stack) -> Stack:
    """The model with all its weights halved."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@pytest.mark.parametrize("how", DUPLICATES)
@given(cases(), runs, st.integers(0, 3))
def test_copies_use_their_own_weights(how: str, case: Case, run: Run, after: int) -> None:
    """A copy of a wrapped model, made in the middle of a generation, is wrapped itself and starts with nothing stored."""
    model = case.wrap()
    start(model, run, after)
    ran, counted = calls(model), stats(model).steps
    twin = halved(DUPLICATES[how](model))
    assert equal(case.run(twin, run), case.run(case.wrap(halved(case.build())), run))
    assert calls(model) == ran and stats(model).steps == counted
    ran = calls(twin)
    assert equal(case.run(model, run), case.run(case.wrap(), run))
    assert calls(twin) == ran
    cachekit.unwrap(twin)
    assert equal(run.outputs(twin), run.outputs(halved(case.build())))
    assert "cachekit" in model.__dict__ and "cachekit" not in twin.__dict__


@given(cases(), runs, st.integers(0, 12))
def test_a_copy_goes_on_alone(case: Case, run: Run, steps: int) -> None:
    """A copy made in the middle of a generation does not disturb it."""
    model, found = case.wrap(), []
    with torch.no_grad(), case.session(model, run.times):
        for i, prediction in enumerate(run.steps(model)):
            found.append(prediction)
            if i == steps:
                run.outputs(copy.deepcopy(model))
    assert equal(found, case.run(case.wrap(), run))


@given(cases(), runs, st.integers(0, 3))
def test_weights_may_change_between_generations(case: Case, run: Run, steps: int) -> None:
    """load_state_dict and moves to another dtype and back work on a wrapped model; the next generation uses what is there."""
    model = case.wrap().double().float()
    start(model, run, steps)
    model.load_state_dict(halved(case.build()).state_dict())
    handle(model).reset()
    assert stats(model).steps == 0 and stats(model).bytes_held == 0
    assert equal(case.run(model, run), case.run(case.wrap(halved(case.build())), run))


@given(cases(), runs)
def test_a_wrapped_model_may_visit_another_device(case: Case, run: Run) -> None:
    """A generation that was begun on another device leaves nothing that one on this device could take."""
    case = replace(case.implicit(), spec=replace(case.spec, time="number"))
    model = case.wrap()
    start(model, run, 1)
    weights = copy.deepcopy(model.state_dict())
    x, y = noise(case.spec, run.batch, run.seed).to("meta"), conditioning(case.spec, run.batch, run.seed).to("meta")
    with torch.no_grad(), torch.device("meta"):
        assert tensor_of(model.to("meta")(x, run.times[0], y)).is_meta
    model.to_empty(device="cpu").load_state_dict(weights)
    assert equal(case.run(model, run), case.run(case.wrap(), run))
