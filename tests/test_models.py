"""Exactness on small diffusers transformers with random weights: what is computed, what is reused, and what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, relative
from running import (
    SCHEDULE,
    SEGMENTS,
    TIMES,
    Seen,
    all_cases,
    assert_equal,
    cases,
    count_forwards,
    generate,
    ran,
    segment_paths,
    watching,
)
from torch import nn
from zoo import HUNYUAN_DIT, LATTE

import cachekit
from cachekit.policies import every, first

BEGINNINGS: tuple[dict[str, Any], ...] = (
    {"policy": "skip-every-2"},
    {"policy": "every-5", "segments": "all"},
    {"policy": "N2-700-50", "reuse": "taylor-2"},
    {"policy": "change-0.1", "reuse": "residual"},
    {"policy": "first-1", "segments": "model", "reuse": "taylor-1"},
    {"policy": "at-most-3", "segments": [(0, 2), (3, 4)], "reuse": "residual-taylor-1"},
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@all_cases
def test_every_1_equals_the_unwrapped_model(case: Case) -> None:
    expected = generate(case.build(), case, TIMES)
    model = cachekit.wrap(case.build(), every(1))
    assert_equal(generate(model, case, TIMES), expected)
    assert model.cachekit.stats.blocks_run == model.cachekit.stats.blocks_total == len(TIMES) * len(case.stack)


@cases
@pytest.mark.parametrize("arguments", BEGINNINGS, ids=lambda arguments: str(arguments["policy"]))
def test_the_first_step_is_exact_under_any_policy(case: Case, arguments: dict[str, Any]) -> None:
    plain, model = case.build(), cachekit.wrap(case.build(), **arguments)
    for seed in (0, 1):
        # More steps in between, so that the second generation starts over something stored.
        assert_equal(generate(model, case, TIMES, seed)[:1], generate(plain, case, TIMES[:1], seed))
    assert model.cachekit.stats.generations == 2


@cases
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("reuse", ["output", pytest.param("taylor-2", marks=pytest.mark.slow)])
def test_equal_inputs_give_the_same_output(case: Case, segments: Any, reuse: str) -> None:
    model = cachekit.wrap(case.build(), first(3), segments=segments, reuse=reuse)
    with model.cachekit.branch("a"):
        stored = generate(model, case, TIMES[:3])[-1]
        again = generate(model, case, TIMES[2:3], start=TIMES[0])[0]
    assert torch.equal(again, stored)
    # Else it would only have been computed again.
    covered = segment_paths(case, segments)
    assert ran(model) == tuple(path not in covered for path in case.stack)


@cases
@pytest.mark.parametrize("reuse", ["residual", "residual-taylor-2"])
def test_equal_inputs_with_residual_reuse_are_equal_up_to_rounding(case: Case, reuse: str) -> None:
    model = cachekit.wrap(case.build(), first(3), reuse=reuse)
    full: Seen = []
    reused: Seen = []
    with model.cachekit.branch("a"):
        generate(model, case, TIMES[:2])
        with watching(model, case.stack, full):
            expected = generate(model, case, TIMES[2:3], start=TIMES[0])[0]
        with watching(model, case.stack[-1:], reused):
            again = generate(model, case, TIMES[2:3], start=TIMES[0])[0]
    # x + (y - x) rounds twice: off by at most eps * (|x| + |y|), once for each stretch that has a residual of its own.
    values = [value for _, inputs, results in full for value in (*inputs, *results) if value.is_floating_point()]
    peak = max(float(value.abs().max()) for value in values)
    stretches = len(segment_paths(case, "middle")) if case is LATTE else 1
    bound = stretches * torch.finfo(torch.float32).eps * 2 * peak
    for a, b in zip(full[-1][1], reused[-1][1], strict=True):
        assert torch.allclose(a, b, rtol=0, atol=bound)
    # What follows is a block and a projection of order one: no more than a few hundred times the error that enters.
    assert torch.allclose(again, expected, rtol=0, atol=300 * bound)
    assert not all(ran(model))


@cases
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_blocks_inside_a_segment_are_not_called(case: Case, segments: Any) -> None:
    model = case.build()
    calls = count_forwards(model, case)
    cachekit.wrap(model, every(3), segments=segments)
    conditioning = case.conditioning()
    covered = segment_paths(case, segments)
    for i, t in enumerate(SCHEDULE[:6]):
        calls.clear()
        model(**case.inputs(t, conditioning=conditioning))
        expected = case.stack if i % 3 == 0 else tuple(path for path in case.stack if path not in covered)
        assert calls == Counter(expected)
        assert ran(model) == tuple(path in expected for path in case.stack)


@cases
def test_a_reused_step_is_not_the_uncached_one(case: Case) -> None:
    """The blocks of these models do matter, so that the equalities above say something."""
    expected = generate(case.build(), case, TIMES)
    found = generate(cachekit.wrap(case.build(), every(2)), case, TIMES)
    differs = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    assert differs[0] == differs[2] == 0.0
    assert min(differs[1], differs[3]) > 1e-3


@cases
def test_blocks_before_the_segment_are_as_ever(case: Case) -> None:
    before = case.stack[: case.stack.index(segment_paths(case, "middle")[0])]
    seen: dict[bool, Seen] = {False: [], True: []}
    for wrapped, found in seen.items():
        model: nn.Module = cachekit.wrap(case.build(), every(4)) if wrapped else case.build()
        with watching(model, before, found):
            generate(model, case, TIMES)
    assert len(seen[True]) == len(before) * len(TIMES)
    for (_, inputs, results), (_, other_inputs, other_results) in zip(seen[True], seen[False], strict=True):
        assert_equal(inputs, other_inputs)
        assert_equal(results, other_results)


def test_a_long_skip_out_of_a_reused_segment() -> None:
    """Blocks 5 to 7 are recomputed; two of them take what the reused blocks 1 and 2 returned, the third what block 0 did."""
    model = cachekit.wrap(HUNYUAN_DIT.build(), first(2), segments=(1, 5))
    late = HUNYUAN_DIT.stack[5:]
    full: Seen = []
    reused: Seen = []
    with model.cachekit.branch("a"):
        generate(model, HUNYUAN_DIT, TIMES[:1])
        with watching(model, late, full):
            expected = generate(model, HUNYUAN_DIT, TIMES[1:2], start=TIMES[0])
        with watching(model, late, reused):
            again = generate(model, HUNYUAN_DIT, TIMES[1:2], start=TIMES[0])
    assert_equal(again, expected)
    for (_, inputs, _), (_, other_inputs, _) in zip(reused, full, strict=True):
        assert_equal(inputs, other_inputs)
    assert ran(model) == (True, False, False, False, False, True, True, True)
