"""Attention, cross-attention and MLP modules as sites: equal to a loop that runs all of them and writes over what they return."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import naive_forecasts
import pytest
import torch
from cases import Case, Shape
from drawing import schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_modules import NAMES, Held, count, run
from original_zoo import ORIGINALS
from running import TIMES, assert_equal, generate
from torch import Tensor
from zoo import CASES, DIT, FLUX, LATTE, PIXART, SD3

import cachekit
from cachekit import Forecast, Segment
from cachekit.policies import every, outside
from cachekit.policies.reuses import TaylorSeer

ALL = (*CASES, *ORIGINALS)
every_case = pytest.mark.parametrize("case", ALL, ids=str)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ours(case: Case, policy: Any, times: Sequence[float] = TIMES, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The predictions of a wrapped model, in one branch, and the model."""
    model = cachekit.wrap(case.build().to(dtype), policy, **options)
    with model.cachekit.session(steps=len(times)), model.cachekit.branch("only"):
        return generate(model, case, times, shape=Shape(dtype=dtype)), model


def period(n: int) -> Any:
    """Every n-th step."""
    return lambda i, t: i % n == 0


@every_case
def test_every_1_is_bit_equal(case: Case) -> None:
    plain = generate(case.build(), case, TIMES)
    for segments in ("modules", "blocks", "stack"):
        found, model = ours(case, "every-1", segments=segments)
        assert_equal(found, plain, segments)
        stats = model.cachekit.stats
        assert stats.blocks_run == stats.blocks_total == len(TIMES) * len(case.stack)
        assert stats.modules_run == stats.modules_total
        assert not stats.dropped and not stats.notes


@every_case
def test_every_module_with_a_period(case: Case) -> None:
    """Bit for bit; how many modules ran is counted, and no block is left out."""
    kinds = tuple(NAMES[case.name])
    holds = [Held(kind, period(2)) for kind in kinds]
    expected = run(case, case.build(), TIMES, holds)
    found, model = ours(case, "every-2", segments="modules")
    assert_equal(found, expected)
    assert not found[1].equal(generate(case.build(), case, TIMES)[1])
    each = sum(count(case, case.build(), held) for held in holds)
    stats = model.cachekit.stats
    assert (stats.modules_run, stats.modules_total) == (2 * each, 4 * each)
    assert [sum(record.modules) for record in stats.records] == [each, 0, each, 0]
    assert stats.blocks_run == stats.blocks_total and not stats.dropped


@every_case
def test_each_kind_has_a_period_of_its_own(case: Case) -> None:
    periods = dict(zip(NAMES[case.name], (3, 2, 4), strict=False))
    expected = run(case, case.build(), TIMES, [Held(kind, period(n)) for kind, n in periods.items()])
    segments = [Segment(modules=kind, policy=every(n)) for kind, n in periods.items()]
    assert_equal(ours(case, "every-1", segments=segments)[0], expected)


@pytest.mark.parametrize("case", (LATTE, *(case for case in ORIGINALS if case.name.startswith("Latte"))), ids=str)
def test_attention_over_space_and_over_time(case: Case) -> None:
    spatial, temporal = Held("attn", period(2), places="spatial"), Held("attn", period(3), places="temporal")
    expected = run(case, case.build(), TIMES, [spatial, temporal])
    segments = [Segment(modules="spatial_attn", policy="every-2"), Segment(modules="temporal_attn", policy="every-3")]
    assert_equal(ours(case, "every-1", segments=segments)[0], expected)
    with pytest.raises(cachekit.ConfigError, match="share module"):
        ours(case, "every-2", segments=["attn", "temporal_attn"])


def test_a_kind_that_a_model_has_not_is_noted() -> None:
    found, model = ours(DIT, "every-2", segments=["temporal_attn", "cross_attn"])
    assert_equal(found, generate(DIT.build(), DIT, TIMES))
    assert sum("with a module of kind" in note for note in model.cachekit.stats.notes) == 2


def within(n: int, window: float, i: int, t: float) -> bool:
    """Every n-th step, and all above a window."""
    return i % n == 0 or t >= window


@st.composite
def held_modules(draw: Any) -> tuple[Case, list[Held], list[Segment]]:
    """Some kinds of modules in some ranges of some model, each with a period and a window."""
    case = draw(st.sampled_from((DIT, PIXART, LATTE, FLUX, SD3)))
    units = len(case.stack) // case.unit
    holds, segments = [], []
    for kind in draw(st.sets(st.sampled_from(sorted(NAMES[case.name])), min_size=1)):
        cuts = sorted(draw(st.sets(st.integers(0, units), min_size=2, max_size=3)))
        for start, stop in pairwise(cuts):
            n, window = draw(st.integers(1, 4)), draw(st.integers(300, 1100))
            backwards = draw(st.booleans())
            holds.append(Held(kind, functools.partial(within, n, window), start, stop))
            ends = (start - units, None if stop == units else stop - units) if backwards else (start, stop)
            segments.append(Segment(*ends, modules=kind, policy=every(n) | outside(window)))
    return case, holds, segments


@settings(max_examples=12)
@given(held_modules(), schedules(max_size=7))
def test_any_kinds_ranges_periods_and_schedules(drawn: Any, times: Sequence[float]) -> None:
    case, holds, segments = drawn
    expected = run(case, case.build(), times, holds)
    found, model = ours(case, "every-1", times, segments=segments)
    assert_equal(found, expected)
    calls = [count(case, case.build(), held) for held in holds]
    counted = sum(each for each, held in zip(calls, holds, strict=True) for ran in held.ran if not ran)
    assert model.cachekit.stats.modules_total - model.cachekit.stats.modules_run == counted


def newton(values: list[tuple[float, Tensor]], now: float, order: int) -> Tensor:
    """The polynomial through the newest values, by divided differences."""
    values = values[: order + 1]
    total, column, factor = values[0][1], [value for _, value in values], 1.0
    for j in range(1, len(values)):
        column = [(column[k] - column[k + 1]) / (values[k][0] - values[k + j][0]) for k in range(len(column) - 1)]
        factor *= now - values[j - 1][0]
        total = total + factor * column[0]
    return total


FORECASTS: dict[str, tuple[Any, Any, float]] = {
    "taylor-2": (Forecast(2, bound=1e3), lambda values, now: newton(values, now, 2), 0.0),
    "taylorseer-1": (TaylorSeer(1), lambda values, now: naive_forecasts.taylorseer(values, now, TaylorSeer(1)), 0.0),
    "residual": (Forecast(beta=1.0), None, 1.0),
    "half": (Forecast(1, beta=0.5), lambda values, now: newton(values, now, 1), 0.5),
}


@pytest.mark.parametrize("case", (DIT, FLUX), ids=str)
@pytest.mark.parametrize("name", FORECASTS)
def test_forecasts_of_every_module(case: Case, name: str) -> None:
    """Taken along t; residuals on the model whose modules take and return one tensor.

    A forecast adds the same few terms in another order: roundings of 2^-53 of values whose weights sum to at most 10, carried
    through at most 28 modules of a relative gain of order 1 each, that is below 28 * 10 * 4 * 2^-53 = 1.3e-13 of the largest
    value. What is observed is 1e-15; a wrong term shows in the first digits.
    """
    reuse, formula, beta = FORECASTS[name]
    if beta and case is FLUX:
        with pytest.raises(cachekit.ConfigError, match="'proj_mlp' takes nothing of the shape"):
            ours(case, "every-2", segments="modules", reuse=reuse)
        return
    times = (950.0, 900.0, 800.0, 650.0, 600.0, 450.0, 300.0)
    kinds = tuple(NAMES[case.name])
    holds = [Held(kind, period(2), formula=formula, beta=beta, by_time=True) for kind in kinds]
    expected = run(case, case.build().double(), times, holds)
    found, _ = ours(case, "every-2", times, torch.float64, segments="modules", reuse=reuse)
    close(found, expected)
    assert not found[-2].allclose(generate(case.build().double(), case, times, shape=Shape(dtype=torch.float64))[-2])


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To the rounding that ``test_forecasts_of_every_module`` derives."""
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("case", (DIT, FLUX, LATTE), ids=str)
def test_blocks_with_one_decision_each_are_the_stack(case: Case) -> None:
    """Under one policy, as far as outputs go: what enters the next block is what this one returned then."""
    expected = ours(case, "every-3", segments="stack")[0]
    assert_equal(ours(case, "every-3", segments="blocks")[0], expected)
    first = ours(case, "every-1", segments=[(0, 1), Segment(1, None, policy="every-2", each=True)])[1]
    ran = first.cachekit.stats.records[1].recomputed
    assert ran == (True,) * case.unit + (False,) * (len(case.stack) - case.unit)
