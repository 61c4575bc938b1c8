"""The graphs of small diffusers transformers, the facts that adapters state of them, and calls that are never cached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, Shape
from running import TIMES, all_cases, assert_equal, cases, generate, ran
from zoo import LATTE

import cachekit
from cachekit.policies import every


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@all_cases
def test_the_graph(case: Case) -> None:
    model = case.build()
    found = cachekit.graph(model, **case.inputs(500))
    assert tuple(found.visits[v].block for v in found.blocks) == case.stack
    whole = tuple(range(len(case.stack)))
    # Latte rearranges the stream between any two of its blocks: no chain reaches further than one.
    assert found.chains == (tuple((v,) for v in whole) if case is LATTE else (whole,))
    assert set(found.long_skips) == set(case.long_skips)
    assert "cachekit" not in model.__dict__
    assert case.stack[0] in str(found)


@all_cases
def test_timesteps_are_read_in_the_schedulers_units(case: Case) -> None:
    model = cachekit.wrap(case.build())
    generate(model, case, TIMES)
    assert [record.t for record in model.cachekit.stats.records] == pytest.approx(TIMES)
    assert model.cachekit.adapter.range == 1000


@all_cases
def test_adapters_name_modules_that_blocks_have(case: Case) -> None:
    model = cachekit.wrap(case.build())
    adapter = model.cachekit.adapter
    for path in case.stack:
        children = {name for name, _ in model.get_submodule(path).named_children()}
        assert children & set(adapter.attention), path
        assert children & set(adapter.mlp), path


def test_latte_segments_count_units() -> None:
    model = cachekit.wrap(LATTE.build(), every(2), segments=(1, 2))
    generate(model, LATTE, TIMES[:2])
    skipped = {"transformer_blocks.1", "temporal_transformer_blocks.1"}
    assert ran(model) == tuple(path not in skipped for path in LATTE.stack)
    found = cachekit.graph(model, **LATTE.inputs(500))
    # The temporal position embedding is added before the first temporal block; elsewhere the stream is only rearranged.
    assert [visit.linked for visit in found.visits] == [None, None] + ["layout"] * 8


@cases
def test_gradients_are_never_cached(case: Case) -> None:
    plain, model = case.build().train(), cachekit.wrap(case.build().train(), "every-10")
    grads = []
    for each in (plain, model):
        # DiT drops labels at random in training.
        torch.manual_seed(0)
        with torch.enable_grad():
            predictions = generate(each, case, TIMES)
            torch.stack(predictions).square().sum().backward()  # type: ignore[no-untyped-call]
        grads.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert_equal(grads[1], grads[0])
    stats = model.cachekit.stats
    assert stats.uncached == {"gradients are recorded": len(TIMES)}
    assert stats.blocks_run == stats.blocks_total == len(TIMES) * len(case.stack)
    assert stats.bytes_peak == 0


@cases
def test_gradients_in_evaluation_mode_are_not_cached_and_say_so(case: Case) -> None:
    model = cachekit.wrap(case.build(), "every-10")
    with torch.enable_grad(), pytest.warns(UserWarning, match="no_grad"):
        predictions = generate(model, case, TIMES)
    assert all(prediction.requires_grad for prediction in predictions)
    assert sum(model.cachekit.stats.uncached.values()) == len(TIMES)


@cases
def test_mixed_timesteps_are_never_cached(case: Case) -> None:
    plain, model = case.build(), cachekit.wrap(case.build(), "every-10")
    generate(model, case, TIMES[:2])
    assert model.cachekit.stats.bytes_held > 0
    for t in (500.0, 300.0):
        inputs = case.inputs(t)
        other = case.timestep(t - 100, Shape())
        inputs["timestep"] = torch.cat([inputs["timestep"][:1], other[1:]])
        assert torch.equal(case.output(model(**inputs)), case.output(plain(**inputs)))
        assert all(ran(model))
    assert model.cachekit.stats.uncached == {"mixed timesteps in one batch": 2}
    assert model.cachekit.stats.bytes_held == 0
