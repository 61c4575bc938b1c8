"""How much an error becomes: against what a line's solution says, and against disturbances put in by hand."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative
from torch import Tensor, nn
from zoo import DIT

import cachekit
from cachekit import Amplification, ConfigError, ModelError
from cachekit.amplification import length
from cachekit.policy import Step

SPEED, RANGE = 3.0, 1000.0


class Linear(nn.Module):
    """x' = SPEED · x over the whole range of t."""

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        return SPEED * x


def euler(model: nn.Module, steps: int) -> Tensor:
    """x after so many equal steps. All samples point the same way, so that only a session tells them from first ones."""
    handle: Any = getattr(model, "cachekit", None)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), handle.session(steps=steps) if handle else contextlib.nullcontext():
        for k in range(steps):
            x = x - model(x, RANGE * (1 - k / steps)) / steps
    return x


@pytest.mark.parametrize("steps", (10, 40))
def test_on_a_linear_equation_it_is_what_the_solution_says(steps: int) -> None:
    """An error e of one prediction changes x by h e SPEED x, and from there it shrinks as x does: a = SPEED / (1 - h SPEED)."""
    model = Linear()
    found = cachekit.measure_amplification(
        model, lambda: euler(model, steps), segments="model", adapter=cachekit.Adapter(timestep="timestep", range=RANGE), points=5
    )
    assert len(found.factors) == 5 and found.timesteps[0] == pytest.approx(RANGE * (1 - 1 / steps))
    assert found.factors == pytest.approx([SPEED / (1 - SPEED / steps)] * 5)
    assert not hasattr(model, "cachekit")


TIMES = tuple(float(t) for t in range(950, 0, -100))


def sample(model: nn.Module) -> Tensor:
    """A few Euler steps with a DiT's own calls; its prediction's first half moves the sample."""
    conditioning = DIT.conditioning()
    x = DIT.sample(TIMES[0], start=TIMES[0])
    with torch.no_grad():
        for t in TIMES:
            inputs = {**DIT.inputs(t, conditioning=conditioning), "hidden_states": x}
            x = x - 0.1 * DIT.output(model(**inputs))[:, :4]
    return x


class Held:
    """In one call, counted from 0, returns what a block returned in the one before."""

    def __init__(self, block: nn.Module, i: int) -> None:
        self.i, self.calls, self.error = i, -1, 0.0
        self.original: Callable[..., Any] = block.forward
        block.__dict__["forward"] = self
        self.last = torch.zeros(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        true = self.original(*args, **kwargs)
        held, self.last = self.last, true.clone()
        if self.calls != self.i:
            return true
        self.error = relative(held, true)
        return held


def test_on_a_dit_it_is_what_disturbances_by_hand_give() -> None:
    """The block at the segment's end returns at one step what it returned at the step before."""
    model = DIT.build()
    found = cachekit.measure_amplification(model, functools.partial(sample, model), points=3)
    true = sample(DIT.build())
    for i, t, factor in zip((1, 5, 9), found.timesteps, found.factors, strict=True):
        disturbed = DIT.build()
        held = Held(disturbed.get_submodule(DIT.stack[-2]), i)
        final = relative(sample(disturbed), true)
        # Steps of a tenth of the range. Norms of float32 tensors from the same operations.
        assert t == TIMES[i] and factor == pytest.approx(final / held.error / 0.1, rel=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    model, adapter = Linear(), cachekit.Adapter(timestep="timestep", range=RANGE)

    def measure(sample: Callable[[], Tensor], **options: Any) -> Amplification:
        return cachekit.measure_amplification(model, sample, **{"segments": "model", "adapter": adapter, **options})

    with pytest.raises(ConfigError, match="two different samples"):
        measure(lambda: euler(model, 4) + torch.rand(()))
    with pytest.raises(ConfigError, match="2 generations"):
        measure(lambda: euler(model, 4) + euler(model, 4))
    with pytest.raises(ConfigError, match="ran 1 steps"):
        measure(lambda: euler(model, 1))
    with pytest.raises(ConfigError, match="ran 0 steps"):
        measure(lambda: euler(cachekit.unwrap(model), 4))
    with pytest.raises(ConfigError, match="range is None"):
        measure(lambda: euler(model, 4), adapter=cachekit.Adapter(timestep="timestep"))
    with pytest.raises(ModelError, match="nothing changed"):
        measure(lambda: euler(model, 4) * 0 + 1)
    assert not hasattr(model, "cachekit")
    cachekit.wrap(model, adapter=adapter)
    with pytest.raises(ModelError, match="is wrapped"):
        measure(lambda: euler(model, 4))


def test_it_is_interpolated_in_t_and_stays_beyond_its_ends() -> None:
    found = Amplification((900.0, 500.0), (3.0, 1.0))
    assert [found(t) for t in (1000.0, 900.0, 700.0, 500.0, 0.0)] == pytest.approx([3.0, 3.0, 2.0, 1.0, 1.0])


@pytest.mark.parametrize("numbers", (((900.0,), (1.0, 2.0)), ((), ()), ((500.0, 900.0), (1.0, 2.0)), ((5.0, 5.0), (1.0, 2.0))))
def test_numbers_that_make_no_sense_are_refused(numbers: Any) -> None:
    with pytest.raises(ValueError, match=r"must fall|at least one"):
        Amplification(*numbers)


def test_a_step_is_as_long_as_the_one_before() -> None:
    """In shares of the range; of the number of steps where that is unknown; never known where both are."""
    assert length(Step(1, 800.0, 10, 1000.0, 900.0), 0.5) == pytest.approx(0.1)
    assert length(Step(2, 800.0, 10, 1000.0, 800.0), 0.5) == 0.5
    assert length(Step(0, 800.0, 10, 1000.0, None), 0.5) == 0.5
    assert length(Step(1, 8.0, 10, None, 9.0), 0.5) == pytest.approx(0.1)
    assert length(Step(1, 8.0, None, None, 9.0), 0.5) == float("inf")
