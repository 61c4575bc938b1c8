"""Plans: what they do, where they are refused, and their files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import STEPS, grid, sampling, small
from drawing import forecasts
from hypothesis import given
from hypothesis import strategies as st
from zoo import PIXART

import cachekit
from cachekit import Forecast, Plan
from cachekit.fingerprint import Fingerprint
from cachekit.json_files import ReuseSpec, segment_specs
from cachekit.policies import every, first
from cachekit.policies.planned import planned

RECOMPUTE = (0, 1, 4, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def plan_for(model: Any, recompute: tuple[int, ...] = RECOMPUTE, segments: Any = "middle", reuse: Any = "grid-taylor-1") -> Plan:
    return Plan(
        model=Fingerprint.of(model),
        timesteps=grid(),
        segments=segment_specs(segments),
        reuse=ReuseSpec.of(reuse),
        recompute=recompute,
        blocks=0.7,
        error=0.01,
        worst=0.02,
        seconds=1.0,
    )


def full_steps(model: Any) -> list[int]:
    return [record.i for record in model.cachekit.stats.records if all(record.recomputed)]


@given(forecasts())
def test_a_file_holds_every_forecast(reuse: Forecast) -> None:
    """All numbers of it, so that a plan does what was searched."""
    assert ReuseSpec.model_validate_json(ReuseSpec.of(reuse).model_dump_json()).reuse() == reuse


@pytest.mark.parametrize("reuse", ["grid-taylor-1", "residual-taylor-1.5"])
def test_all_ways_to_use_one(reuse: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object, its file and its spec string do the same as the policy, the segments and the reuse that it holds."""
    monkeypatch.chdir(tmp_path)
    plan = plan_for(model, reuse=reuse)
    plan.save("plan.json")
    plan.save("my plan.json")
    cachekit.wrap(model, planned(RECOMPUTE, grid()), segments="middle", reuse=reuse)
    expected = sampling(model)(0)
    for policy in (plan, "plan.json", "plan:plan.json", f"plan:{tmp_path / 'plan.json'}", "plan:my plan.json | (plan:plan.json)"):
        cachekit.wrap(model, policy)
        assert torch.equal(sampling(model)(0), expected)
        assert full_steps(model) == list(RECOMPUTE)
    cachekit.wrap(model, "plan.json", reuse="output", segments="all")
    sampling(model)(0)
    assert full_steps(model) == list(RECOMPUTE)
    cachekit.wrap(model, "plan.json | first-3")
    sampling(model)(0)
    assert full_steps(model) == [0, 1, 2, 4, 6]
    cachekit.unwrap(model)


@given(
    recompute=st.sets(st.integers(1, STEPS - 1)),
    segments=st.sampled_from(["model", "middle", "all", "skip-2", "attn", "blocks", (2, 4)]),
    order=st.integers(0, 3),
    axis=st.sampled_from(["t", "grid"]),
    beta=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_files_hold_all_of_it(recompute: set[int], segments: Any, order: int, axis: Any, beta: float) -> None:
    reuse = Forecast(order, beta=beta, axis=axis)
    plan = plan_for(small(), (0, *sorted(recompute)), segments, reuse)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    ran_away = plan.model_copy(update={"error": math.inf, "worst": math.inf})
    assert Plan.model_validate_json(ran_away.model_dump_json()) == ran_away
    assert plan.reuse.reuse() == reuse
    assert plan.preset().policy == planned((0, *sorted(recompute)), grid())


def test_another_model_is_refused(model: Any) -> None:
    """Other depth, class, parameters or long skips; the same architecture with other weights is the same model."""
    plan = plan_for(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    cachekit.unwrap(cachekit.wrap(other, plan))
    for wrong in (PIXART.build(), cachekit.add_long_skips(copy.deepcopy(model))):
        with pytest.raises(cachekit.ConfigError, match="made for another model"):
            cachekit.wrap(wrong, plan)
        assert "cachekit" not in wrong.__dict__


@pytest.mark.parametrize("steps", [4, STEPS - 1, STEPS + 1, 16])
def test_another_schedule_is_refused(model: Any, steps: int) -> None:
    """At the first step that is not the plan's, before the model returns anything for it."""
    cachekit.wrap(model, plan_for(model))
    try:
        with pytest.raises(cachekit.ConfigError, match="made for another schedule"):
            sampling(model, steps)(0)
        assert torch.isfinite(sampling(model)(0)).all(), "and the right one goes on working"
        assert full_steps(model) == list(RECOMPUTE)
    finally:
        cachekit.unwrap(model)


def test_second_evaluations_are_computed(model: Any) -> None:
    """As in Heun's method: two calls at each timestep."""
    cachekit.wrap(model, plan_for(model))
    with torch.no_grad(), model.cachekit.session(steps=2 * STEPS):
        for k, t in enumerate(grid()):
            for again in (0, 1):
                x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2 * k + again))
                model(x, timestep=torch.full((2,), t), class_labels=torch.tensor([1, 7]))
    ran = [all(record.recomputed) for record in model.cachekit.stats.records]
    cachekit.unwrap(model)
    assert ran[1::2] == [True] * STEPS and [k for k, full in enumerate(ran[::2]) if full] == list(RECOMPUTE)


def test_what_no_plan_is_told(model: Any, tmp_path: Path) -> None:
    with pytest.raises(cachekit.ConfigError, match="there is no plan to read"):
        cachekit.wrap(model, str(tmp_path / "none.json"))
    for text in ("no json", json.dumps({**plan_for(model).model_dump(mode="json"), "surplus": 1})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(cachekit.ConfigError, match="is no plan"):
            cachekit.wrap(model, f"plan:{tmp_path / 'bad.json'}")
    with pytest.raises(cachekit.ConfigError, match="names no file"):
        cachekit.wrap(model, "plan:")
    with pytest.raises(cachekit.ConfigError, match="can't be kept in a file"):
        ReuseSpec.of("hermite-2")
    with pytest.raises(cachekit.ConfigError, match="one decision covers them all"):
        segment_specs([cachekit.Segment(1, 2, policy=every(2))])
    with pytest.raises(ValueError, match="counted from 0"):
        planned((0, STEPS), grid())
    with pytest.raises(cachekit.ConfigError):
        cachekit.plan("plan.json | first-2", grid())
    assert first(2) is not None and "cachekit" not in model.__dict__
