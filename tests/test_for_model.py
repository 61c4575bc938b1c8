"""Presets that depend on the model: made by wrap, for the model and its adapter, however they are combined."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from hypothesis import given, settings
from hypothesis import strategies as st
from running import generate
from torch import nn
from zoo import DIT, FLUX, WAN

import cachekit
from cachekit.for_model import ForModel, by_class
from cachekit.policies import at_most, every, first, magcache, magcache_published, skip_every
from cachekit.policies.magcache_published import MEASURED, shifted
from cachekit.policy import Policy
from cachekit.preset import Preset
from cachekit.spec import parse_policy

TIMES = tuple(float(t) for t in range(950, 100, -70))
FLUX_TIMES = shifted(28, 1.15)


@dataclass(frozen=True)
class Named(ForModel):
    """``every(n)`` on all blocks, n by the adapter's name, and what the model is called in the reuse."""

    periods: tuple[tuple[str, int], ...]

    def for_model(self, model: nn.Module, adapter: cachekit.Adapter) -> Preset:
        found = dict(self.periods).get(adapter.name)
        if found is None:
            raise cachekit.ConfigError(f"no period is known for {type(model).__name__}; write every-N")
        return Preset(every(found), segments="all", reuse="residual")


NAMED = Named((("dit", 3), ("wan", 2)))


def recomputed(case: Any, policy: Any, **options: Any) -> list[bool]:
    """Which steps a wrapped model ran all of the middle of its stack in."""
    model = cachekit.wrap(case.build(), policy, **options)
    with torch.no_grad(), model.cachekit.session(steps=len(TIMES)), model.cachekit.branch("only"):
        generate(model, case, TIMES)
    return [all(record.recomputed[2:-2]) for record in model.cachekit.stats.records]


def test_wrap_makes_it_for_the_model() -> None:
    assert recomputed(DIT, NAMED) == [i % 3 == 0 for i in range(len(TIMES))]
    assert recomputed(WAN, NAMED) == [i % 2 == 0 for i in range(len(TIMES))]
    model = cachekit.wrap(DIT.build(), NAMED)
    (site,) = model.cachekit._engine.sites
    assert (site.segment.start, site.segment.stop, site.reuse.beta) == (None, None, 1.0)
    (site,) = cachekit.wrap(DIT.build(), NAMED, segments="middle", reuse="output").cachekit._engine.sites
    assert (site.segment.start, site.segment.stop, site.reuse.beta) == (1, -1, 0.0)


def test_the_adapter_that_is_in_use_counts() -> None:
    assert recomputed(DIT, NAMED, adapter="wan")[:3] == [True, False, True]


OPERATORS = {"|": operator.or_, "&": operator.and_}
parts: st.SearchStrategy[Any] = st.one_of(
    st.builds(every, st.integers(1, 4)),
    st.builds(first, st.integers(0, 6)),
    st.builds(at_most, st.integers(0, 3)),
    st.just(NAMED),
    st.just(Preset(first(4), segments="all")),
    st.builds(Named, st.just((("dit", 4),))),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(tuple(OPERATORS)), parts), min_size=1, max_size=4), parts)
def test_combinations_are_those_of_what_it_stands_for(tail: list[tuple[str, Any]], head: Any) -> None:
    """Joined and then made for the model is the same as made for the model and then joined, from either side."""

    def now(part: Any) -> Any:
        return part.for_model(model, adapter) if isinstance(part, ForModel) else part

    model, adapter = DIT.build(), cachekit.Adapter(name="dit")
    for flip in (False, True):
        late, early = head, now(head)
        for symbol, part in tail:
            join = OPERATORS[symbol]
            late = join(part, late) if flip else join(late, part)
            early = join(now(part), early) if flip else join(early, now(part))
        expected, found = parse_policy(early), now(parse_policy(late))
        assert parse_policy(found) == expected


def test_segments_may_have_one_of_their_own() -> None:
    segments = [cachekit.Segment(1, 3, policy=NAMED), cachekit.Segment(3, 5)]
    model = cachekit.wrap(DIT.build(), "every-2", segments=segments)
    policies = [site.policy for site in model.cachekit._engine.sites]
    assert policies == [every(3), every(2)]
    joined = Preset(first(2), segments=segments) | Preset(every(5))
    policies = [site.policy for site in cachekit.wrap(DIT.build(), joined).cachekit._engine.sites]
    assert policies == [every(3) | every(5), first(2) | every(5)]


def test_what_joins_nothing_is_refused() -> None:
    for broken in (3, "every-2", None):
        with pytest.raises(TypeError, match="unsupported operand"):
            NAMED | broken
        with pytest.raises(TypeError, match="unsupported operand"):
            broken & NAMED


def test_presets_that_disagree_are_refused_once_the_model_is_known() -> None:
    with pytest.raises(cachekit.ConfigError, match="two presets with different reuse"):
        cachekit.wrap(DIT.build(), skip_every(2) | NAMED)


def test_without_a_model_it_says_so() -> None:
    for policy in (NAMED, NAMED | every(2), every(2) & NAMED, "magcache-0.06"):
        with pytest.raises(cachekit.ConfigError, match="depends on the model"):
            cachekit.plan(policy, TIMES)


def test_a_model_that_it_does_not_know_keeps_its_wrap() -> None:
    """The message says what to write instead, and a model that was wrapped stays so."""
    model = cachekit.wrap(FLUX.build(), "every-2")
    handle = model.cachekit
    with pytest.raises(cachekit.ConfigError, match=r"no period is known for FluxTransformer2DModel; write every-N"):
        cachekit.wrap(model, NAMED)
    assert model.cachekit is handle


def test_one_that_is_not_finished() -> None:
    class Unfinished(ForModel):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished must define for_model"):
        cachekit.wrap(DIT.build(), Unfinished())


def test_known_facts_are_found_along_the_class_hierarchy() -> None:
    class Base(nn.Module):
        pass

    class Derived(Base):
        pass

    assert by_class(Derived(), {"Base": 1}) == 1
    assert by_class(Derived(), {"Base": 1, "Derived": 2}) == 2
    assert by_class(nn.Linear(1, 1), {"Base": 1}) is None


def test_published_ratios_of_flux() -> None:
    """They are those that diffusers ships, and its hooks decide and predict the same on the schedule of their measurement."""
    assert MEASURED["FluxTransformer2DModel"].ratios == pytest.approx(FLUX_MAG_RATIOS.tolist(), abs=1e-6)
    theirs = FLUX.build()
    apply_mag_cache(theirs, MagCacheConfig(0.06, num_inference_steps=28, mag_ratios=FLUX_MAG_RATIOS))
    ours = cachekit.wrap(FLUX.build(), "magcache-0.06")
    with torch.no_grad():
        with theirs.cache_context("only"):
            expected = generate(theirs, FLUX, FLUX_TIMES)
        found = generate(ours, FLUX, FLUX_TIMES)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    full = [all(record.recomputed) for record in ours.cachekit.stats.records]
    assert all(full[:6]) and 6 < sum(full) < 20


def test_the_published_schedule_is_that_of_diffusers_pipeline() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=1.15)
    assert pytest.approx(scheduler.timesteps.tolist(), abs=1e-3) == FLUX_TIMES


def test_published_ratios_are_those_of_magcache_with_the_same_options() -> None:
    known = MEASURED["FluxTransformer2DModel"]
    made = magcache_published(0.1, limit=2, retention=0.4)
    assert isinstance(made, ForModel)
    assert made.for_model(FLUX.build(), cachekit.Adapter()) == magcache(known.ratios, known.timesteps, 0.1, 2, 0.4)
    combined = cachekit.wrap(FLUX.build(), "magcache-0.06 | every-2", segments="middle")
    policy: Policy[Any] = combined.cachekit._engine.sites[0].policy
    assert policy == magcache(known.ratios, known.timesteps).policy | every(2)


@pytest.mark.parametrize("spec", ("magcache", "magcache-0.06", "magcache-0.06 | every-3"))
def test_no_ratios_are_published_for_other_models(spec: str) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"DiTTransformer2DModel.*measure them.*magcache\(ratios, timesteps"):
        cachekit.wrap(DIT.build(), spec)
