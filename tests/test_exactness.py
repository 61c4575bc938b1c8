"""Where caching must change nothing at all: every step of every(1), first steps, and reused steps on the very same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from drawing import At, runs
from hypothesis import assume, given
from stack_runs import Run, advance, calls_of_one, conditioning, equal, given_time, noise, tensor_of
from stacks import calls
from torch import Tensor
from wrapping import Case, cases, covered, handle, stats

from cachekit.policies import every
from cachekit.reuse import parse_reuse

MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@given(cases(), runs)
def test_every_1_is_bit_equal_on_every_step(case: Case, run: Run) -> None:
    """And it runs each block as often as the unwrapped model does."""
    model = case.under(every(1)).wrap()
    assert equal(case.run(model, run), run.outputs(case.build()))
    assert calls(model) == [count * len(run.times) for count in calls_of_one(case.spec)]


@given(cases(), runs, runs)
def test_the_first_step_of_any_generation_is_bit_equal(case: Case, one: Run, other: Run) -> None:
    """Under any policy, segments and reuse; of a second generation as well."""
    model, plain = case.wrap(), case.build()
    for run in (one, replace(other, seed=10 + other.seed)):
        assert torch.equal(case.run(model, run)[0], run.outputs(plain)[0])


@given(cases(), runs)
def test_disabled_is_bit_equal_and_leaves_no_trace(case: Case, run: Run) -> None:
    """Within ``disabled()`` the model is the unwrapped one; a generation around it goes on as if nothing had been."""
    model, plain = case.wrap(), case.build()
    alone = case.run(case.wrap(), run)
    other = replace(run, seed=run.seed + 30)
    found = []
    with torch.no_grad(), case.session(model, run.times):
        for prediction in run.steps(model):
            found.append(prediction)
            with handle(model).disabled():
                assert equal(other.outputs(model), other.outputs(plain))
    assert equal(found, alone)
    assert stats(model).steps == len(run.times)


def repeated(case: Case, run: Run, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The last recomputed output of a run, and what reuse makes of the very same inputs, t too."""
    model = case.under(At(frozenset(range(len(run.times))))).wrap(case.build().to(dtype))
    x, y = noise(case.spec, run.batch, run.seed, dtype=dtype), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad(), handle(model).session(), handle(model).branch("a"):
        for t in run.times:
            time = given_time(case.spec, t, run.batch)
            stored = tensor_of(model(x, time, y)).clone()
            before, x = x, advance(x, stored, 50)
        ran = calls(model)
        reused = tensor_of(model(before, time, y)).clone()
    record = stats(model).records[-1].recomputed
    inside = covered(case.segments, len(record))
    assert [v not in inside for v in range(len(record))] == list(record), "the step was not a reused one"
    assert case.segments != "model" or calls(model) == ran
    return stored, reused


@given(cases(betas=(0.0,)), runs)
def test_the_same_inputs_give_the_same_output_bit_by_bit(case: Case, run: Run) -> None:
    """With output reuse and its forecasts, after any history."""
    stored, reused = repeated(case, run)
    assert torch.equal(stored, reused)


@given(cases(), runs)
def test_the_same_inputs_give_the_same_output_within_rounding(case: Case, run: Run) -> None:
    """With residuals too, where x + (y - x) rounds.

    A site gives beta * x + (y - beta * x): three roundings, each at most u = 2^-53 of a value of order 1 to 10. A block passes
    an error on at most about ten times as large (1 + |1 + gate| * |mix| * |1 + scale|), and a model has at most ten visits;
    those that are reused add none. Observed is far less, and a wrong residual is off by 1e-2.
    """
    stored, reused = repeated(case, run, torch.float64)
    assert torch.allclose(stored, reused, rtol=1e-7, atol=1e-7)


@given(cases(betas=(0.0,)), runs)
def test_autocast_repeats_bit_by_bit(case: Case, run: Run) -> None:
    """Where blocks return half precision and the model adds up in single."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stored, reused = repeated(case, run)
    assert torch.equal(stored, reused)


@pytest.mark.parametrize("mode", MODES)
@given(cases(), runs)
def test_every_mode_is_exact(mode: str, case: Case, run: Run) -> None:
    """Without gradients, in inference mode (tensors count no versions there), under autocast: every(1) and all first steps."""
    # The prediction is in half precision there, the sample is not: between the two there is no residual.
    assume(mode != "autocast" or case.segments != "model" or parse_reuse(case.reuse).beta == 0)
    with torch.no_grad(), MODES[mode]():
        expected = run.outputs(case.build())
        assert equal(case.run(case.under(every(1)).wrap(), run), expected)
        assert torch.equal(case.run(case.wrap(), run)[0], expected[0])


@given(cases(), runs)
def test_inference_mode_changes_nothing(case: Case, run: Run) -> None:
    """Reused steps are those of no_grad; and what was made of inference tensors is gone with its generation."""
    model = case.wrap()
    with torch.inference_mode():
        ours = [prediction.clone() for prediction in case.run(model, run)]
    assert equal(ours, case.run(case.wrap(), run))
    other = replace(run, seed=run.seed + 60)
    assert equal(case.run(model, other), case.run(case.wrap(), other))
