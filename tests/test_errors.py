"""What cannot be meant is refused, with what to write instead, and the model stays as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from drawing import NO_GLUE, runs
from hypothesis import given
from stack_blocks import StackSpec
from stack_runs import Run, conditioning, equal, noise
from stacks import Stack, build
from torch import Tensor, nn
from wrapping import Case, cases, handle, identical, snapshot, stats

import cachekit
from cachekit import Adapter, ConfigError, Forecast, ModelError, Policy, Segment
from cachekit.policies import change, every, first
from cachekit.policy import Step

FOUR = StackSpec(depth=4, order=(0, 1, 2, 3), glue=NO_GLUE)
RUN = Run((900.0, 500.0, 100.0))


@contextmanager
def refused(error: type[Exception], says: str) -> Iterator[None]:
    """The block must raise cachekit's own error, and its message contain this text."""
    with pytest.raises(error, match=re.escape(says)) as caught:
        yield
    assert isinstance(caught.value, cachekit.CachekitError)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"policy": "skip-evry-2"}, "known: "),
        ({"policy": "skip-evry-2"}, "skip-every-N"),
        ({"policy": "skip-evry-2"}, "outside-START-CLOSE"),
        ({"policy": "skip-every"}, "does not fit skip-every-N"),
        ({"policy": "every-0"}, "greater than 0"),
        ({"policy": "every-2 every-3"}, "join policies with | or &"),
        ({"policy": "(every-2 | last-3"}, "closing parenthesis"),
        ({"policy": ""}, "write for example"),
        ({"policy": 2}, "'skip-every-2'"),
        ({"policy": change}, "'skip-every-2'"),
        ({"segments": "centre"}, "'middle', 'all', 'skip-K', 'model'"),
        ({"segments": "skip--1"}, "'skip-K'"),
        ({"segments": (1, 2, 3)}, "(1, 2, 3)"),
        ({"segments": (1, 2.5)}, "(1, 2.5)"),
        ({"segments": []}, "(start, stop)"),
        ({"segments": (3, 1)}, "(3, 1)"),
        ({"segments": (2, 2)}, "(2, 2)"),
        ({"segments": (-1, -3)}, "(-1, -3)"),
        ({"segments": range(0, 4, 2)}, "contiguous"),
        ({"segments": Segment("middle")}, "'middle'"),
        ({"segments": Segment("all")}, "'all'"),
        ({"segments": Segment("model", 3)}, "'model'"),
        ({"segments": Segment(1.5, 2)}, "1.5"),  # type: ignore[arg-type]
        ({"segments": ["model", "model"]}, "twice"),
        ({"segments": Segment(1, 2, policy="evry-2")}, "known: "),
        ({"segments": Segment(1, 2, reuse="held")}, "'output', 'residual'"),
        ({"segments": "model", "policy": "change-0.1"}, "segments='middle'"),
        ({"segments": "model", "policy": "every-2 | change-0.1"}, "segments='middle'"),
        ({"segments": Segment("model", policy=change(0.1))}, "segments='middle'"),
        ({"reuse": "taylor"}, "taylor-K"),
        ({"reuse": "tailor-2"}, "'taylor-K'"),
        ({"reuse": 2}, "cachekit.Forecast(order="),
        ({"reuse": Forecast}, "cachekit.Forecast(order="),
        ({"adapter": "dti"}, "known: "),
        ({"adapter": "dti"}, "pixart"),
        ({"adapter": 3}, "cachekit.Adapter"),
    ],
    ids=str,
)
def test_arguments_of_wrap(wrong: dict[str, Any], says: str) -> None:
    """Unknown specs list the known ones; ranges that can't be meant, and probes where there is nothing to probe, are refused."""
    model = build(FOUR)
    before = snapshot(model)
    with refused(ConfigError, says):
        cachekit.wrap(model, **wrong)
    assert identical(before, snapshot(model))


@given(cases(), runs)
def test_a_refused_wrap_leaves_the_one_before(case: Case, run: Run) -> None:
    """Also in the middle of its generation."""
    model = case.wrap()
    with torch.no_grad(), case.session(model, run.times):
        found = []
        for prediction in run.steps(model):
            found.append(prediction)
            with refused(ConfigError, "known: "):
                cachekit.wrap(model, "skip-evry-2")
    assert equal(found, case.run(case.wrap(), run))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"segments": (0, 9)}, "outside this stack of 4 blocks"),
        ({"segments": (-9, 2)}, "outside this stack of 4 blocks"),
        ({"segments": [(0, 2), (1, 3)]}, "share block blocks.1"),
        ({"segments": ["all", (1, 2)]}, "share block blocks.1"),
        ({"segments": "all", "policy": "change-0.1"}, "segments='middle'"),
        ({"segments": [(1, 2), Segment(0, 1, policy=change(0.1))]}, "segments='middle'"),
    ],
    ids=str,
)
def test_what_the_model_shows_to_be_impossible(wrong: dict[str, Any], says: str) -> None:
    """Known at the first call only; it raises at each, stores nothing, and the model can be wrapped otherwise or unwrapped."""
    model = build(FOUR)
    before = snapshot(model)
    cachekit.wrap(model, **{"policy": "every-2", **wrong})
    for _ in range(2):
        with refused(ConfigError, says):
            RUN.outputs(model)
        assert stats(model).bytes_held == 0
    assert equal(RUN.outputs(cachekit.wrap(model, "every-2")), RUN.outputs(cachekit.wrap(build(FOUR), "every-2")))
    cachekit.unwrap(model)
    assert identical(before, snapshot(model))


@pytest.mark.parametrize("segments", ["middle", "skip-1", "skip-5", (1, -1)])
def test_a_segment_without_blocks_is_noted(segments: Any) -> None:
    """On a short stack the usual segments may cover nothing: then all runs, and stats say why."""
    model = cachekit.wrap(build(StackSpec(depth=2, order=(0, 1), glue=NO_GLUE)), "every-2", segments=segments)
    assert equal(RUN.outputs(model), RUN.outputs(build(StackSpec(depth=2, order=(0, 1), glue=NO_GLUE))))
    assert any("covers" in note for note in stats(model).notes)


class Outer(nn.Module):
    """A model inside another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        return self.inner(x, t, y)


class Pipeline:
    """No module, though it holds one."""

    def __init__(self) -> None:
        self.transformer = build(FOUR)


@pytest.mark.parametrize("wrong", [Pipeline(), Stack, "DiT", None], ids=["pipeline", "class", "name", "none"])
def test_only_modules_are_wrapped(wrong: Any) -> None:
    """Pipelines and classes are not; the message says what is."""
    with refused(ModelError, "pipe.transformer"):
        cachekit.wrap(wrong)


@pytest.mark.parametrize("part", ["inner", "inner.blocks.1"])
@pytest.mark.parametrize("order", ["outer first", "part first"])
def test_nothing_nests_in_silence(part: str, order: str) -> None:
    """Neither a module that holds a wrapped one nor one that lies in a wrapped one; after unwrap either can be wrapped."""
    outer = Outer(build(FOUR))
    inside = outer.get_submodule(part)
    one, other = (outer, inside) if order == "outer first" else (inside, outer)
    cachekit.wrap(one, adapter=Adapter(timestep="t"))
    before = snapshot(outer)
    with refused(ModelError, "cachekit.unwrap"):
        cachekit.wrap(other, adapter=Adapter(timestep="t"))
    assert identical(before, snapshot(outer))
    cachekit.unwrap(one)
    assert cachekit.wrap(other, adapter=Adapter(timestep="t")) is other


class Plain(nn.Module):
    """Blocks without a timestep, or with one by an unusual name, and a prediction of another width."""

    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3)) for _ in range(3)])
        self.head = nn.Linear(3, out)

    def forward(self, x: Tensor, tau: float | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


def test_a_model_without_a_timestep() -> None:
    """It is told which argument to name; named, it works, and must be given."""
    x = torch.ones(2, 3)
    with torch.no_grad():
        with refused(ModelError, "adapter=cachekit.Adapter(timestep='...')"):
            cachekit.wrap(Plain())(x, 3.0)
        model = cachekit.wrap(Plain(), adapter=Adapter(timestep="tau"))
        model(x, 3.0)
        with refused(ModelError, "tau"):
            model(x)
    assert stats(model).steps == 1


def test_a_timestep_that_is_none() -> None:
    """The message names the argument that was found, and not given."""
    model = cachekit.wrap(build(FOUR))
    with torch.no_grad(), refused(ModelError, "'t' is None"):
        model(noise(FOUR, 2, 0), None, conditioning(FOUR, 2, 0))


def test_a_residual_of_another_shape() -> None:
    """The prediction less the sample is no residual where the model predicts a variance as well."""
    model = cachekit.wrap(Plain(out=6), "every-2", segments="model", reuse="residual", adapter=Adapter(timestep="tau"))
    with torch.no_grad(), refused(ConfigError, "reuse='output'"):
        model(torch.ones(2, 3), 3.0)
    assert stats(model).bytes_held == 0


class Sampleless(nn.Module):
    """A model whose only argument is the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3)) for _ in range(3)])

    def forward(self, t: Tensor) -> Tensor:
        x = t.reshape(-1, 1).expand(-1, 3)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_residual_without_a_sample() -> None:
    """There is nothing that the prediction could be less."""
    model = cachekit.wrap(Sampleless(), "every-2", segments="model", reuse="residual")
    with torch.no_grad(), refused(ConfigError, "reuse='output'"):
        model(torch.ones(2))


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": -3}, {"timesteps": []}, {"steps": 2, "timesteps": [3, 2, 1]}, {"steps": 2.5}, {"steps": True}],
    ids=str,
)
def test_sessions_that_cannot_be(wrong: dict[str, Any]) -> None:
    """A session has a whole number of steps, at least one; given twice, both must agree."""
    model = cachekit.wrap(build(FOUR))
    with refused(ConfigError, "step"), handle(model).session(**wrong):
        pass
    with handle(model).session(steps=3, timesteps=RUN.times):
        RUN.outputs(model)
    with handle(model).session(steps=cast(int, np.int64(3))):
        RUN.outputs(model)


class Undecided(Policy[None]):
    """A policy that lacks ``decide``."""


def test_a_policy_without_decide() -> None:
    """What to define is said by its name."""
    model = cachekit.wrap(build(FOUR), Undecided(), reuse="output")
    with pytest.raises(NotImplementedError, match=r"Undecided must define decide\(self, state, step\) -> bool"):
        RUN.outputs(model)
    assert stats(model).bytes_held == 0


class Forgetful(Policy[None]):
    """A policy whose ``decide`` lacks a return."""

    def decide(self, state: None, step: Step) -> bool:
        """None at every step."""
        return cast(bool, None)


@pytest.mark.parametrize("policy", [Forgetful(), Forgetful() | first(1), every(2) & Forgetful()], ids=["alone", "or", "and"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_decision_that_is_none(policy: Policy[Any], per_sample: bool) -> None:
    """It would pass for a reuse at every step."""
    with refused(ConfigError, "Forgetful.decide(state, step) returned None; return True to recompute"):
        cachekit.plan(policy, RUN.times)
    model = cachekit.wrap(build(FOUR), policy, reuse="output", per_sample=per_sample)
    with refused(ConfigError, "returned None"):
        RUN.outputs(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Forecast(order=-1),
        lambda: Forecast(beta=-0.5),
        lambda: Forecast(bound=0),
        lambda: Forecast(axis="sigma"),  # type: ignore[arg-type]
    ],
)
def test_forecasts_refuse_numbers_that_make_no_sense(make: Callable[[], Forecast]) -> None:
    """By pydantic, as policies do."""
    with pytest.raises(ValueError, match="Input should be"):
        make()


@dataclass(frozen=True)
class Own:
    """A reuse as users write it; ``returns`` is what its weights are at every time."""

    returns: Any = (1.0,)
    length: Any = 1
    beta: float = 0.0

    def time(self, step: Step) -> float:
        """The timestep."""
        return step.t

    def weights(self, times: Any, t: float) -> Any:
        """The same ones always."""
        return self.returns


@pytest.mark.parametrize("wrong", [Own(length=0), Own(length=1.5), Own(beta=float("nan")), Own(beta=float("inf"))], ids=str)
def test_reuses_that_cannot_be(wrong: Own) -> None:
    """What wrap can see of them it refuses."""
    with refused(ConfigError, "Own("):
        cachekit.wrap(build(FOUR), "every-2", reuse=wrong)


@pytest.mark.parametrize("returns", [None, (), (float("nan"),), (float("inf"), 1.0)], ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
def test_weights_that_cannot_be(returns: Any, per_sample: bool) -> None:
    """They would make zeros of a value, or no numbers, in silence."""
    model = cachekit.wrap(build(FOUR), "every-2", reuse=Own(returns), per_sample=per_sample)
    with refused(ConfigError, "return a finite number for each time, newest first"):
        RUN.outputs(model)
    fine = cachekit.wrap(build(FOUR), "every-2", reuse=Own(np.ones(1)), per_sample=per_sample)
    assert equal(RUN.outputs(fine), RUN.outputs(cachekit.wrap(build(FOUR), "every-2", per_sample=per_sample)))


class Misspelt(Policy[None]):
    """A policy that needs what there is not."""

    def __init__(self, *needs: Any) -> None:
        self.wanted = frozenset(needs)

    def required(self) -> frozenset[Any]:
        """What it was told."""
        return self.wanted

    def decide(self, state: None, step: Step) -> bool:
        """Always."""
        return True


@pytest.mark.parametrize("needs", [("stepz",), ("end", "prob"), ("modulated",), (3,), tuple("probe")], ids=str)
@pytest.mark.parametrize("segments", ["middle", "model"])
def test_needs_that_there_are_not(needs: tuple[Any, ...], segments: str) -> None:
    """A misspelt one would pass in silence."""
    model = cachekit.wrap(build(FOUR))
    before = handle(model)
    with refused(ConfigError, "its needs are a set of 'steps', 'end', 'estimate', 'probe', 'front' and Signals"):
        cachekit.wrap(model, Misspelt(*needs), segments=segments, reuse="output")
    assert handle(model) is before


@pytest.mark.parametrize("wrong", [("modulate",), ("probe", "steps"), (None,)], ids=str)
def test_signals_that_there_are_not(wrong: tuple[Any, ...]) -> None:
    """The known ones are listed."""
    with refused(ConfigError, "write one of"):
        cachekit.Signal(*wrong)


def test_a_shallow_copy_is_not_unwrapped() -> None:
    """It would take the original's cache off, and leave its own interceptor behind."""
    model = cachekit.wrap(build(FOUR), "every-2", reuse="output")
    for take in (cachekit.unwrap, cachekit.wrap):
        with refused(ModelError, "copy" if take is cachekit.unwrap else "wrapped already"):
            take(copy.copy(model))
    RUN.outputs(model)
    assert 0 < stats(model).blocks_run < stats(model).blocks_total
    assert not hasattr(cachekit.unwrap(copy.deepcopy(model)), "cachekit")
