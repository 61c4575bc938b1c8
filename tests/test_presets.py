"""Published methods: each against a loop that runs every block and writes over what the method reuses (``published``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import naive_forecasts
import pytest
import torch
from cases import Case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published import FLUX2, Range, change, forecast, run
from running import generate
from torch import Tensor
from zoo import COGVIDEOX, DIT, FLUX, HUNYUAN_DIT, WAN

import cachekit
from cachekit.policies import (
    adacache,
    at_most,
    dbcache,
    delta_dit,
    every,
    first,
    first_block,
    foca,
    hicache,
    magcache,
    taylorseer,
    teacache,
)
from cachekit.policies.adacache import CODEBOOK
from cachekit.policies.reuses import Bdf, Hermite, TaylorSeer
from cachekit.preset import Preset
from cachekit.reuse import Forecast

TIMES = tuple(float(t) for t in range(950, 100, -70))
# As a flow's shifted grid: short steps at first, long ones at the end.
UNEVEN = (990.0, 980.0, 965.0, 945.0, 920.0, 890.0, 850.0, 800.0, 735.0, 650.0, 540.0, 390.0, 180.0)
DEPTH = {DIT: 6, WAN: 6, COGVIDEOX: 6, FLUX: 7}

# One stream; two that are returned in this order and in that; two kinds of block.
models = pytest.mark.parametrize("case", tuple(DEPTH), ids=str)
few = settings(max_examples=12)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ours(
    case: Case, policy: Any, steps: int | None = len(TIMES), times: Sequence[float] = TIMES, **options: Any
) -> tuple[list[Tensor], Any]:
    """The predictions of a wrapped model, in a session that knows its steps or in none, and the model."""
    model = cachekit.wrap(case.build(), policy, **options)
    if steps is None:
        return generate(model, case, times), model
    with model.cachekit.session(steps=steps), model.cachekit.branch("only"):
        return generate(model, case, times), model


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(a.equal(b) for a, b in zip(found, expected, strict=True))


def assert_equal_to(ranges: Sequence[Range], case: Case, policy: Any, steps: int | None = len(TIMES)) -> list[bool]:
    """Predictions and decisions, bit for bit: a residual is one subtraction and one addition, in the loop as in the library."""
    expected = run(case, case.build(), TIMES, ranges)
    found, model = ours(case, policy, steps)
    records = [record.recomputed for record in model.cachekit.stats.records]
    for held in ranges:
        assert held.recomputed == [all(record[held.start : held.stop]) for record in records]
        assert held.recomputed == [any(record[held.start : held.stop]) for record in records]
    covered = {k for held in ranges for k in range(held.start, held.stop)}
    assert all(record[k] for record in records for k in range(len(case.stack)) if k not in covered)
    assert same(found, expected)
    return ranges[0].recomputed


class Threshold:
    """First-Block Cache's and DBCache's rule, with the probe's residual at the last full step."""

    def __init__(self, threshold: float, warm_up: int = 0, limit: int | None = None) -> None:
        self.threshold, self.warm_up, self.limit = threshold, warm_up, limit
        self.last: Tensor | None = None
        self.reused = 0

    def __call__(self, front: Tensor, i: int, t: float) -> bool:
        full = self.last is None or i < self.warm_up or self.reused == self.limit or change(front, self.last) > self.threshold
        self.last = front if full else self.last
        self.reused = 0 if full else self.reused + 1
        return full


@models
@pytest.mark.parametrize("threshold", (0.05, 0.15, 0.3))
def test_first_block_cache(case: Case, threshold: float) -> None:
    full = assert_equal_to([Range(1, DEPTH[case], Threshold(threshold))], case, f"first-block-{threshold}")
    assert threshold < 0.3 or not all(full)


def test_first_block_cache_where_the_model_does_something_between_blocks() -> None:
    """One decision, and a residual for each stretch: what joins the two streams between them runs on every step."""
    first_blocks = Threshold(0.9)
    double = Range(1, 2, first_blocks)
    single = Range(2, 6, lambda _, i, t: double.recomputed[i])
    full = assert_equal_to([double, single], FLUX2, "first-block-0.9")
    assert 1 < sum(full) < len(TIMES)


@few
@given(
    st.sampled_from(tuple(DEPTH)), st.integers(1, 3), st.integers(0, 2), st.floats(0.05, 0.4), st.integers(0, 5), st.integers(1, 3)
)
def test_dbcache(case: Case, f: int, b: int, threshold: float, warm_up: int, limit: int) -> None:
    """The probe is what f blocks add together, and b blocks run on top of what is reused."""
    for most in (limit, None):
        held = Range(f, DEPTH[case] - b, Threshold(threshold, warm_up, most))
        assert_equal_to([held], case, dbcache(f, b, threshold, warm_up=warm_up, limit=most))


@models
def test_dbcache_of_one_block_is_first_block_cache(case: Case) -> None:
    for threshold in (0.1, 0.2, 0.3):
        assert same(ours(case, dbcache(1, 0, threshold, warm_up=0))[0], ours(case, first_block(threshold))[0])


def due(n: int, warm_up: int = 3) -> Any:
    """TaylorSeer's schedule: the first few steps, then one in n, counted from the last full step."""
    since = 0

    def decide(front: Tensor, i: int, t: float) -> bool:
        nonlocal since
        full = i < warm_up or since == n - 1
        since = 0 if full else since + 1
        return full

    return decide


FORECASTS: dict[str, tuple[Preset, Any]] = {
    "taylorseer-0": (taylorseer(3, 0), lambda history, now: history[0][1]),
    "taylorseer-1": (taylorseer(3, 1), lambda history, now: naive_forecasts.taylorseer(history, now, TaylorSeer(1))),
    "taylorseer-2": (taylorseer(4, 2), lambda history, now: naive_forecasts.taylorseer(history, now, TaylorSeer(2))),
    "taylorseer-warm-up": (
        taylorseer(4, 1, warm_up=1),
        lambda history, now: naive_forecasts.taylorseer(history, now, TaylorSeer(1)),
    ),
    "hicache-1": (hicache(3, 1), lambda history, now: naive_forecasts.hermite(history, now, Hermite(1))),
    "hicache-2": (hicache(4, 2), lambda history, now: naive_forecasts.hermite(history, now, Hermite(2))),
    "foca": (foca(3), lambda history, now: naive_forecasts.bdf(history, now, Bdf()).float()),
}
PERIODS = {"taylorseer-2": 4, "taylorseer-warm-up": 4, "hicache-2": 4}


@pytest.mark.parametrize("case", (DIT, FLUX), ids=str)
@pytest.mark.parametrize("name", FORECASTS)
@pytest.mark.parametrize("times", (TIMES, UNEVEN), ids=("even", "uneven"))
def test_forecasts_of_the_whole_stack(case: Case, name: str, times: Sequence[float]) -> None:
    """The papers' differences, step by step, instead of weights; the number of the step is their time.

    The samples are given, so that no error is carried from step to step. A forecast adds up three values with weights whose
    absolute sum is at most 25 (8.5, 12 and 4.5: order 2, three steps ahead of a dense warm-up), here in another order: a
    handful of roundings of 2^-24 of each, 25 * 5 * 2^-24 = 7e-6 of the largest value, and a norm and a projection pass a
    relative error on as large as it is. What is observed is 4e-7; a wrong term shows in the first digits.
    """
    preset, formula = FORECASTS[name]
    held = Range(0, DEPTH[case], due(PERIODS.get(name, 3), 1 if name.endswith("warm-up") else 3), forecast(formula))
    expected = run(case, case.build(), times, [held])
    found, model = ours(case, preset, times=times)
    assert [all(record.recomputed) for record in model.cachekit.stats.records] == held.recomputed
    assert 3 <= sum(held.recomputed) < len(TIMES) / 1.5
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@models
def test_order_0_holds_the_output(case: Case) -> None:
    """FORA's rule on the whole stack, whatever the family of forecasts."""
    held = ours(case, first(3) | at_most(2), segments="all", reuse="output")[0]
    for preset in (taylorseer(3, 0), hicache(3, 0), taylorseer(3, 1), foca(3)):
        found = ours(case, preset, reuse=None if preset.reuse.order == 0 else Forecast())[0]
        assert same(found, held)


@models
@pytest.mark.parametrize(("n", "blocks", "early"), ((2, 2, 0.5), (3, 3, 0.3), (4, 1, 1.0), (2, 3, 0.0)))
@pytest.mark.parametrize("known", (True, False))
def test_delta_dit(case: Case, n: int, blocks: int, early: float, known: bool) -> None:
    """The last blocks' residual is reused early, the first ones' later; without a session it goes by t."""
    depth, reach = DEPTH[case], 1000.0

    def is_early(i: int, t: float) -> bool:
        return i < early * len(TIMES) if known else t > (1 - early) * reach

    front = Range(0, blocks, lambda _, i, t: i % n == 0 or is_early(i, t))
    rear = Range(depth - blocks, depth, lambda _, i, t: i % n == 0 or not is_early(i, t))
    full = assert_equal_to([front, rear], case, delta_dit(n, blocks, early), len(TIMES) if known else None)
    assert all(full) == (early == 1.0)


def test_delta_dit_is_off_where_nothing_tells_how_far_the_generation_is() -> None:
    """And stats say so."""
    model = ours(DIT, delta_dit(2, 2), None, adapter=cachekit.Adapter())[1]
    assert model.cachekit.stats.blocks_run == model.cachekit.stats.blocks_total
    assert any("counts from the end was off" in note for note in model.cachekit.stats.notes)


class Codebook:
    """AdaCache's rule, as the authors' loop has it: in a full step, look up when the next one is. The last two are full as well."""

    def __init__(self, codebook: dict[float, int]) -> None:
        self.codebook = codebook
        self.last: Tensor | None = None
        self.at, self.i, self.next = 0, 0, 0

    def __call__(self, front: Tensor, i: int, t: float) -> bool:
        self.i = i
        return i >= self.next or i >= len(TIMES) - 2

    def see(self, middle: Tensor) -> None:
        """What the block in the middle adds in a full step."""
        wait = 1
        if self.last is not None:
            d = change(middle, self.last) / (self.i - self.at)
            wait = list(self.codebook.values())[-1]
            for bound, steps in self.codebook.items():
                if d < bound:
                    wait = steps
                    break
        self.last, self.at, self.next = middle, self.i, self.i + wait


@models
@pytest.mark.parametrize("codebook", (dict(CODEBOOK), {0.08: 4, 0.12: 3, 0.16: 2, 1.0: 1}), ids=("authors", "finer"))
def test_adacache(case: Case, codebook: dict[float, int]) -> None:
    preset, rule = adacache(codebook=tuple(codebook.items())), Codebook(codebook)
    held = Range(0, DEPTH[case], rule, watch=((DEPTH[case] - 1) // 2, rule.see))
    full = assert_equal_to([held], case, preset)
    assert full[:2] == full[-2:] == [True, True] and not all(full)


def test_adacache_of_a_change_that_is_no_number() -> None:
    """A block that returns none is run on every step: what it changes by is not known."""
    model = DIT.build()
    next(model.get_submodule(DIT.stack[2]).parameters()).fill_(float("nan"))
    cachekit.wrap(model, "adacache")
    with model.cachekit.session(steps=len(TIMES)), model.cachekit.branch("only"):
        generate(model, DIT, TIMES)
    assert all(all(record.recomputed) for record in model.cachekit.stats.records)


@pytest.mark.parametrize("codebook", ((), ((0.2, 3), (0.1, 2)), ((0.1, 3), (0.1, 2)), ((0.1, 0),)))
def test_codebooks_that_make_no_sense(codebook: Any) -> None:
    with pytest.raises(ValueError, match=r"rise from one to the next|greater than 0"):
        adacache(codebook=codebook)


@given(
    st.lists(st.floats(0.9, 1.1), min_size=2, max_size=30),
    st.floats(0.01, 0.3),
    st.integers(0, 4),
    st.floats(0, 1),
)
def test_magcache(ratios: list[float], threshold: float, limit: int, retention: float) -> None:
    """The authors' loop: rho and its error accumulate over the steps since the last full one, after a share of full steps."""
    times = [1000.0 - 30 * i for i in range(len(ratios))]
    expected, rho, error, reused = [], 1.0, 0.0, 0
    for i, ratio in enumerate(ratios):
        full = i == 0 or i < int(retention * len(ratios) + 0.5)
        if not full:
            rho, reused = rho * ratio, reused + 1
            error += abs(1 - rho)
            assume(abs(error - threshold) > 1e-9)
            full = error > threshold or reused > limit
        if full:
            rho, error, reused = 1.0, 0.0, 0
        expected.append(full)
    assert list(cachekit.plan(magcache(tuple(ratios), tuple(times), threshold, limit, retention), times)) == expected


@models
def test_magcache_reuses_the_residual_of_the_stack(case: Case) -> None:
    ratios = (1.0,) * len(TIMES)
    held = Range(0, DEPTH[case], lambda _, i, t: i < 3 or (i - 2) % 4 == 0)
    assert not all(assert_equal_to([held], case, magcache(ratios, TIMES)))


def test_magcache_refuses_ratios_that_fit_no_timesteps() -> None:
    with pytest.raises(ValueError, match="3 ratios for 2 timesteps"):
        magcache((1.0, 1.0, 1.0), (900.0, 800.0))


PRESETS: tuple[Any, ...] = (
    "first-block-0.2",
    "dbcache-2-1-0.2",
    "taylorseer-3-1",
    "hicache-3-2",
    "foca-3",
    "delta-dit-2-2",
    "adacache",
    "speca-2",
    teacache(0.3, coefficients=(1.0, 0.0)),
    magcache((1.0,) * len(TIMES), TIMES),
)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset if isinstance(preset, str) else None)
def test_what_a_preset_carries_can_be_overridden(preset: Any) -> None:
    """Segments, reuse or both; what is not given stays the preset's."""
    model = ours(DIT, preset, segments="middle")[1]
    assert all(record.recomputed[0] and record.recomputed[-1] for record in model.cachekit.stats.records)
    assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total
    plain, held = ours(DIT, preset)[0], ours(DIT, preset, reuse="taylor-2")[0]
    assert same(plain[:1], held[:1]) and not same(plain, held)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset if isinstance(preset, str) else None)
def test_combinations_reach_every_segment(preset: Any) -> None:
    """``| every-1`` makes every step full and ``& first-1`` none, whichever stands first, on segments with own policies too."""
    written = cachekit.spec.parse_policy(preset)
    for all_full in (written | every(1), every(1) | written):
        model = ours(DIT, all_full)[1]
        assert model.cachekit.stats.blocks_run == model.cachekit.stats.blocks_total
    for one_full in (written & first(1), first(1) & written):
        records = ours(DIT, one_full)[1].cachekit.stats.records
        covered = [k for k in range(DEPTH[DIT]) if not records[-1].recomputed[k]]
        assert covered and not any(record.recomputed[k] for record in records[1:] for k in covered)


def test_a_limit_joined_to_a_threshold_counts_every_reuse() -> None:
    for spec in ("first-block-9 | at-most-2", "at-most-2 | first-block-9"):
        full = [all(record.recomputed) for record in ours(DIT, spec)[1].cachekit.stats.records]
        assert full == [i % 3 == 0 for i in range(len(TIMES))]


def test_the_middle_of_a_segment_needs_a_block() -> None:
    with pytest.raises(cachekit.ConfigError, match="the block in the middle of the segment"):
        ours(DIT, "adacache", segments="model")


@pytest.mark.parametrize("preset", ("first-block-0.2", "dbcache-2-1-0.2"))
@pytest.mark.parametrize("segments", ("all", "model"))
def test_probes_need_a_block_before_the_segment(preset: str, segments: str) -> None:
    with pytest.raises(cachekit.ConfigError, match="the block before the segment"):
        ours(DIT, preset, segments=segments)


def test_presets_on_a_model_with_long_skips() -> None:
    """Where the method's authors have none: what later blocks take in from a reused range is held as well."""
    for preset in ("first-block-0.3", "dbcache-2-2-0.3", "taylorseer-3-1", "delta-dit-2-3"):
        found, model = ours(HUNYUAN_DIT, preset)
        assert all(bool(value.isfinite().all()) for value in found)
        assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total and not model.cachekit.stats.dropped
