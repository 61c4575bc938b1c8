"""Adapters serve the original repositories' classes too, by their names alone. The classes here are small stand-ins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, relative
from original_zoo import DIT, HUNYUAN_DIT, HUNYUAN_VIDEO, LATTE, LATTE_T2V, ORIGINALS, PIXART, PIXART_MS
from running import SCHEDULE, SEGMENTS, TIMES, assert_equal, count_forwards, generate, ran, segment_paths
from torch import Tensor

import cachekit
from cachekit.policies import every, first

originals = pytest.mark.parametrize("case", ORIGINALS, ids=str)

ADAPTERS = {
    "DiT": "dit",
    "PixArt": "pixart",
    "PixArtMS": "pixart",
    "Latte": "latte-class",
    "LatteT2V": "latte",
    "HunYuanDiT": "hunyuan-dit",
    "HYVideoDiffusionTransformer": "hunyuan-video-original",
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@originals
def test_the_adapter_is_found_by_the_class_name(case: Case) -> None:
    model = case.build()
    assert not type(model).__module__.startswith(("cachekit", "diffusers"))
    adapter = cachekit.wrap(model).cachekit.adapter
    assert adapter.name == ADAPTERS[case.name]
    assert case.name in adapter.classes
    # A user's own class that builds upon it.
    derived = case.build()
    derived.__class__ = type("Mine", (type(derived),), {})
    assert cachekit.wrap(derived).cachekit.adapter.name == ADAPTERS[case.name]


@originals
def test_the_timestep_is_found_and_in_the_schedulers_units(case: Case) -> None:
    model = cachekit.wrap(case.build())
    generate(model, case, TIMES)
    assert [record.t for record in model.cachekit.stats.records] == list(TIMES)
    inputs = case.inputs(123.0)
    sample, t = (inputs.pop(name) for name in case.names)
    model(sample, t, **inputs)
    assert model.cachekit.stats.records[-1].t == 123.0
    assert model.cachekit.adapter.range == 1000


@pytest.mark.parametrize("case", [PIXART, PIXART_MS], ids=str)
def test_fractional_timesteps_of_a_continuous_solver(case: Case) -> None:
    model = cachekit.wrap(case.build())
    times = (998.75, 748.5, 498.25)
    generate(model, case, times)
    assert [record.t for record in model.cachekit.stats.records] == list(times)


@originals
def test_the_graph(case: Case) -> None:
    found = cachekit.graph(case.build(), **case.inputs(500))
    assert tuple(found.visits[v].block for v in found.blocks) == case.stack
    whole = list(range(len(case.stack)))
    chains: dict[Case, list[list[int]]] = {
        LATTE: [[v] for v in whole],
        LATTE_T2V: [[v] for v in whole],
        # What concatenates the two streams ends a chain.
        HUNYUAN_VIDEO: [whole[:3], whole[3:]],
    }
    assert [list(chain) for chain in found.chains] == chains.get(case, [whole])
    assert set(found.long_skips) == set(case.long_skips)


@pytest.mark.parametrize("case", [LATTE, LATTE_T2V], ids=str)
def test_lattes_units_are_pairs(case: Case) -> None:
    model = cachekit.wrap(case.build(), every(2), segments=(1, 3))
    found = cachekit.graph(model, **case.inputs(500))
    # Before the first temporal block the time embedding is added.
    assert [visit.linked for visit in found.visits] == [None, None] + ["layout"] * 6
    generate(model, case, TIMES[:2])
    assert ran(model) == (True,) * 2 + (False,) * 4 + (True,) * 2
    # One stretch: only what the second unit's temporal block returned is held.
    x = case.inputs(500)[case.names[0]]
    tokens = x.shape[0] * 3 * 16 * 24
    assert model.cachekit.stats.bytes_held == 4 * tokens


def test_a_text_refiners_blocks_are_not_in_the_stack() -> None:
    model = HUNYUAN_VIDEO.build()
    refiner = {f"txt_in.individual_token_refiner.blocks.{k}" for k in range(2)}
    assert refiner <= {name for name, _ in model.named_modules()}
    calls: Counter[str] = Counter()
    for path in refiner:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.update([path]))
    cachekit.wrap(model, first(1), segments="all")
    generate(model, HUNYUAN_VIDEO, TIMES)
    # They run at every step.
    assert calls == dict.fromkeys(refiner, len(TIMES))
    assert not any(ran(model))


@originals
def test_adapters_name_modules_that_blocks_have(case: Case) -> None:
    """Each name is that of a module in some block; where attention is a module at all, every block has one, and an MLP."""
    model = cachekit.wrap(case.build())
    adapter = model.cachekit.adapter
    children = {path: {name for name, _ in model.get_submodule(path).named_children()} for path in case.stack}
    assert {*adapter.attention, *adapter.mlp} and adapter.mlp
    if "attention" in adapter.model_fields_set and not adapter.attention:
        assert {*adapter.mlp} <= set().union(*children.values())
        return
    for path, names in children.items():
        assert names & set(adapter.attention), path
        assert names & set(adapter.mlp), path


@originals
def test_every_1_equals_the_unwrapped_model(case: Case) -> None:
    expected = generate(case.build(), case, TIMES)
    model = cachekit.wrap(case.build(), every(1))
    assert_equal(generate(model, case, TIMES), expected)
    # The blocks do matter, so that the equality says something.
    reused = generate(cachekit.wrap(case.build(), every(4)), case, TIMES)
    assert min(relative(a, b) for a, b in zip(reused[1:], expected[1:], strict=True)) > 1e-3


@originals
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_segments_skip_what_they_cover(case: Case, segments: Any) -> None:
    model = case.build()
    calls = count_forwards(model, case)
    cachekit.wrap(model, every(3), segments=segments)
    conditioning = case.conditioning()
    covered = segment_paths(case, segments)
    for i, t in enumerate(SCHEDULE[:6]):
        calls.clear()
        model(**case.inputs(t, conditioning=conditioning, start=SCHEDULE[0]))
        expected = case.stack if i % 3 == 0 else tuple(path for path in case.stack if path not in covered)
        assert calls == Counter(expected)


@originals
def test_check_finds_everything_to_hold(case: Case) -> None:
    report = cachekit.check(case.build(), **case.inputs(500))
    assert report.ok, str(report)


def test_long_skips_out_of_a_reused_segment() -> None:
    model = cachekit.wrap(HUNYUAN_DIT.build(), first(2), segments=(1, 5))
    with model.cachekit.branch("a"):
        generate(model, HUNYUAN_DIT, TIMES[:1])
        expected = generate(model, HUNYUAN_DIT, TIMES[1:2], start=TIMES[0])
        again = generate(model, HUNYUAN_DIT, TIMES[1:2], start=TIMES[0])
    assert_equal(again, expected)
    assert ran(model) == (True, False, False, False, False, True, True, True)


def sample(model: Any, case: Case, method: str, **extra: Any) -> list[Tensor]:
    """A sampling loop that calls a method of the model, which calls the model's own forward."""
    conditioning = case.conditioning()
    inputs = case.inputs(SCHEDULE[0], conditioning=conditioning, start=SCHEDULE[0])
    x, found = inputs[case.names[0]], []
    for t, following in zip(SCHEDULE, (*SCHEDULE[1:], 0.0), strict=True):
        now = case.inputs(t, conditioning=conditioning)[case.names[1]]
        prediction = getattr(model, method)(x, now, **conditioning, **extra)
        found.append(prediction.clone())
        noise = prediction if prediction.shape == x.shape else prediction.chunk(2, dim=-3)[0]
        x = x - (t - following) / 1000 * noise
    return found


METHODS: tuple[tuple[Case, str, dict[str, Any]], ...] = (
    (DIT, "forward_with_cfg", {"cfg_scale": 4.0}),
    (PIXART, "forward_with_cfg", {"cfg_scale": 4.0}),
    (PIXART, "forward_with_dpmsolver", {}),
    (PIXART_MS, "forward_with_dpmsolver", {}),
    (LATTE, "forward_with_cfg", {"cfg_scale": 7.0}),
)


@pytest.mark.parametrize(("case", "method", "extra"), METHODS, ids=[f"{case}-{method}" for case, method, _ in METHODS])
def test_methods_that_call_forward_are_cached(case: Case, method: str, extra: dict[str, Any]) -> None:
    expected = sample(case.build(), case, method, **extra)
    assert_equal(sample(cachekit.wrap(case.build(), every(1)), case, method, **extra), expected)
    model = case.build()
    calls = count_forwards(model, case)
    cachekit.wrap(model, every(2))
    found = sample(model, case, method, **extra)
    assert torch.equal(found[0], expected[0])
    covered = segment_paths(case, "middle")
    planned = [i % 2 == 0 for i in range(len(SCHEDULE))]
    stats = model.cachekit.stats
    assert stats.generations == 1
    assert [all(record.recomputed) for record in stats.records] == planned
    assert all(calls[path] == (sum(planned) if path in covered else len(planned)) for path in case.stack)
    assert not stats.uncached and not stats.dropped
    assert sample(cachekit.unwrap(model), case, method, **extra)[-1].equal(expected[-1])
