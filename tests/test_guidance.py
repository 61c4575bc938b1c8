"""The unconditional pass of guidance rebuilt from the conditional one, against loops that run both passes and write one over."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Shape, relative
from diffusers.hooks import FasterCacheConfig, apply_faster_cache
from drawing import At, schedules
from guided import (
    DOUBLE,
    batch_of,
    half_of,
    in_one_batch,
    published,
    rebuilt,
    separately,
    weighted,
    with_attention_held,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import DIT_PIPELINE, LATTE_PIPELINE, PIXART_PIPELINE, WAN_PIPELINE, Recipe
from published import COGVIEW4
from torch import Tensor
from zoo import COGVIDEOX, DIT, HUNYUAN_DIT, LATTE, PIXART, WAN

import cachekit
from cachekit import ConfigError, Segment, Step
from cachekit.policies import every, fastercache
from cachekit.policies.pab import broadcast
from cachekit.policies.reuses import Frequencies

TIMES = tuple(float(t) for t in range(950, 40, -70))
BATCHED = (DIT, PIXART, LATTE, COGVIDEOX, HUNYUAN_DIT)
HALVES = {"first": 0, "last": 1}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to rounding: predictions are of the size of 1, and a batch of half the size may add its products up in another order,
    a few roundings of 2^-53 a block; the transform adds 64 terms with as many roundings, and a few weights of 1.1 or 1.2 follow.
    What is observed is below 1e-14. A difference of another step, or another weight, shows in the first digits.
    """
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), f"step {step} differs by up to {(a - b).abs().max()}"


def full(i: int, t: float) -> bool:
    """diffusers' schedule of the unconditional pass."""
    return i % 5 == 0 or not -1 < t < 641


def joined(cond: Sequence[Tensor], uncond: Sequence[Tensor], which: str) -> list[Tensor]:
    """Both passes in one batch."""
    pairs = zip(cond, uncond, strict=True)
    return [torch.cat([c, u] if which == "first" else [u, c]) for c, u in pairs]


def split(found: Sequence[Tensor], which: str) -> tuple[list[Tensor], list[Tensor]]:
    """The conditional and the unconditional half of each prediction."""
    halves = [list(half) for half in zip(*(tensor.chunk(2) for tensor in found), strict=True)]
    return halves[HALVES[which]], halves[1 - HALVES[which]]


@settings(max_examples=30)
@given(st.integers(1, 17), st.integers(1, 17), st.floats(0.0, 1000.0), st.integers(0, 99), st.sampled_from((DOUBLE, torch.float16)))
def test_frequencies_are_weighted_wave_by_wave(height: int, width: int, t: float, seed: int, dtype: torch.dtype) -> None:
    """Any size, even or odd. In half precision the sums are in single precision, and the result is rounded once: 2^-11 of it."""
    value = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)
    expected = published(value.double(), t)
    tolerance = 1e-12 if dtype is DOUBLE else 2**-10
    found = Frequencies().carry(value, Step(3, t))
    assert found.dtype is dtype and torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance * 4)
    # The ways around the transform: nothing to weigh, and one weight for all.
    assert Frequencies(1.0, 1.0).carry(value, Step(3, t)).equal(value)
    even = Frequencies(1.5, 1.5, low_close=-1, high_start=901).carry(value, Step(3, t))
    assert torch.allclose(
        even.double(), weighted(value.double(), *(2 * [1.5 if t < 901 else 1.0])), rtol=tolerance, atol=tolerance * 4
    )


@pytest.mark.parametrize("which", HALVES)
@pytest.mark.parametrize("case", BATCHED, ids=str)
def test_both_passes_in_one_batch(case: Case, which: Any) -> None:
    n = 2
    cond, uncond = split(in_one_batch(case, case.build().double(), TIMES, n), which)
    expected = rebuilt(cond, uncond, TIMES, full, published)
    model = cachekit.wrap(case.build().double(), broadcast(5, 641, -1), segments="uncond", reuse="frequencies", cond=which)
    close(in_one_batch(case, model, TIMES, n), joined(cond, expected, which))
    stats, depth = model.cachekit.stats, len(case.stack)
    shares = [1.0 if full(i, t) else 0.5 for i, t in enumerate(TIMES)]
    assert [sum(record.shares or record.recomputed) for record in stats.records] == [share * depth for share in shares]
    # And the first call once more on one half.
    assert stats.blocks_run == (sum(shares) + 0.5) * depth and not stats.notes and not stats.dropped
    assert stats.bytes_held == uncond[0].numel() * 8
    assert not torch.allclose(expected[-1], uncond[-1], atol=1e-3)


@pytest.mark.parametrize("said", ("names", "before"))
@pytest.mark.parametrize("case", (WAN, COGVIEW4, DIT), ids=str)
def test_passes_in_separate_calls(case: Case, said: str) -> None:
    cond, uncond = separately(case, case.build().double(), TIMES, 2, lambda _: (0, 1))
    expected = rebuilt(cond, uncond, TIMES, full, published)
    model = cachekit.wrap(
        case.build().double(),
        broadcast(5, 641, -1),
        segments="uncond",
        reuse=Frequencies(),
        cond=None if said == "names" else "before",
    )
    names = {"name": lambda k: model.cachekit.branch(("cond", "uncond")[k])} if said == "names" else {}
    found = separately(case, model, TIMES, 2, lambda _: (0, 1), **names)
    assert all(a.equal(b) for a, b in zip(found[0], cond, strict=True))
    close(found[1], expected)
    stats = model.cachekit.stats
    assert [all(record.recomputed) for record in stats.records] == [f for i, t in enumerate(TIMES) for f in (True, full(i, t))]
    assert stats.generations == 1 and not stats.notes and stats.bytes_held == 2 * uncond[0].numel() * 8


@pytest.mark.parametrize("inner", ("", "blocks", "attn"))
@pytest.mark.parametrize("cond", (*HALVES, "before"))
@pytest.mark.parametrize(("case", "reuse"), ((DIT, "output"), (LATTE, "residual"), (DIT, "taylor-1")), ids=str)
def test_bytes_of_both_passes_are_known_beforehand(case: Case, reuse: str, cond: Any, inner: str) -> None:
    """Of a batch the half that is held, of separate calls both; with segments within the model, and a history of two."""
    n = 2
    within: list[Any] = {"": [], "blocks": [Segment(1, 3)], "attn": [Segment(modules="attn")]}[inner]
    segments = [Segment("uncond"), *(replace(segment, reuse="taylor-2") for segment in within)]
    model = case.build().double()
    conditioning = case.conditioning(0, Shape(2 * n, DOUBLE))
    given = batch_of(case, TIMES[0], n, TIMES[0]) | conditioning
    if cond == "before":
        given = case.inputs(TIMES[0], n, 0, DOUBLE, conditioning=half_of(conditioning, 0, n), start=TIMES[0])
    expected = cachekit.graph(model, **given).nbytes(segments, reuse, cond)
    cachekit.wrap(model, "every-2", segments=segments, reuse=reuse, cond=cond)
    if cond == "before":
        separately(case, model, TIMES, n, lambda _: (0, 1))
    else:
        in_one_batch(case, model, TIMES, n)
    assert model.cachekit.stats.bytes_held == expected > 0 and not model.cachekit.stats.notes


def test_bytes_of_no_two_passes() -> None:
    graph = cachekit.graph(DIT.build(), **DIT.inputs(900.0, 3))
    with pytest.raises(ConfigError, match="no batch of both passes"):
        graph.nbytes("uncond", cond="last")
    with pytest.raises(ConfigError, match="no segment is 'uncond'"):
        graph.nbytes("middle", cond="last")


def test_names_that_pipelines_give() -> None:
    """diffusers' cache_context, in which Wan, CogView4 and others call their passes."""
    plain = separately(WAN, WAN.build().double(), TIMES, 1, lambda _: (0, 1))
    model = cachekit.wrap(WAN.build().double(), broadcast(5, 641, -1), segments="uncond", reuse=Frequencies())
    found = separately(WAN, model, TIMES, 1, lambda _: (0, 1), name=lambda k: model.cache_context(("cond", "uncond")[k]))
    close(found[1], rebuilt(plain[0], plain[1], TIMES, full, published))


windows = st.tuples(st.integers(0, 1000), st.integers(-1, 500)).filter(lambda w: w[1] < w[0])


@settings(max_examples=25)
@given(st.integers(1, 6), windows, windows, windows, schedules(), st.integers(1, 2), st.sampled_from((*HALVES, "before")))
def test_any_period_window_and_schedule(
    n: int, both: Any, low: Any, high: Any, times: tuple[float, ...], count: int, which: Any
) -> None:
    reuse = Frequencies(1.2, 0.7, low_start=low[0], low_close=low[1], high_start=high[0], high_close=high[1])
    model = cachekit.wrap(DIT.build().double(), broadcast(n, *both), segments="uncond", reuse=reuse, cond=which)

    def runs(i: int, t: float) -> bool:
        return i % n == 0 or not both[1] < t < both[0]

    def carry(difference: Tensor, t: float) -> Tensor:
        return weighted(difference, 1.2 if low[1] < t < low[0] else 1.0, 0.7 if high[1] < t < high[0] else 1.0)

    plain = DIT.build().double()
    # In a session: between the last of few timesteps a sample may turn as far as another generation's.
    if which == "before":
        cond, uncond = separately(DIT, plain, times, count, lambda _: (0, 1))
        with model.cachekit.session(timesteps=times):
            found = separately(DIT, model, times, count, lambda _: (0, 1))
        close([*found[0], *found[1]], [*cond, *rebuilt(cond, uncond, times, runs, carry)])
    else:
        cond, uncond = split(in_one_batch(DIT, plain, times, count), which)
        with model.cachekit.session(timesteps=times):
            whole = in_one_batch(DIT, model, times, count)
        close(whole, joined(cond, rebuilt(cond, uncond, times, runs, carry), which))
    assert not model.cachekit.stats.notes


@pytest.mark.parametrize("case", (DIT, COGVIDEOX), ids=str)
@pytest.mark.parametrize("which", ("first", "last", "before"))
def test_period_one_is_uncached(case: Case, which: Any) -> None:
    """Bit for bit, with attention's part and without."""
    for policy, segments in ((every(1), "uncond"), (fastercache(2, 1), None)):
        ours = cachekit.wrap(case.build(), policy, segments=segments, reuse=Frequencies() if segments else None, cond=which)
        if which == "before":
            found, plain = (separately(case, model.double(), TIMES, 2, lambda _: (0, 1)) for model in (ours, case.build()))
            assert all(a.equal(b) for k in (0, 1) for a, b in zip(found[k], plain[k], strict=True))
        else:
            whole, uncached = (in_one_batch(case, model, TIMES, 2, torch.float32) for model in (ours, case.build()))
            assert all(a.equal(b) for a, b in zip(whole, uncached, strict=True))


FORMATS = {DIT: "BCHW", PIXART: "BCHW", COGVIDEOX: "BFCHW", LATTE: "BCFHW", WAN: "BCFHW"}
SPLIT = ["hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask", "class_labels"]


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_diffusers_hooks(case: Case) -> None:
    """The same predictions as diffusers' FasterCache without its part for attention (which counts its own approximations as values,
    and here those that were computed). diffusers transforms in single precision whatever the model has, 2^-24 of values of the
    size of 1, over 64 of them: some 1e-6."""
    n = 2
    theirs: Any = case.build().double()
    now = {"t": 0.0}
    config = FasterCacheConfig(
        current_timestep_callback=lambda: now["t"],
        tensor_format=FORMATS[case],
        spatial_attention_block_identifiers=("none",),
        temporal_attention_block_identifiers=("none",),
        attention_weight_callback=lambda _: 0.5,
        _unconditional_conditional_input_kwargs_identifiers=SPLIT,
    )
    apply_faster_cache(theirs, config)
    expected = []
    for t in at_each(now, TIMES):
        expected += in_one_batch(case, theirs, (t,), n, start=TIMES[0])
    ours = cachekit.wrap(case.build().double(), fastercache(), cond="last", segments=fastercache().segments[0])
    found = in_one_batch(case, ours, TIMES, n)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not ours.cachekit.stats.notes and any(record.shares for record in ours.cachekit.stats.records)


def at_each(now: dict[str, float], times: Sequence[float]) -> Iterator[float]:
    for t in times:
        now["t"] = t
        yield t


def share(i: int, t: float) -> float:
    """How far a generation is whose number of steps nobody knows."""
    return 1 - t / 1000


@pytest.mark.parametrize("which", (*HALVES, "before"))
@pytest.mark.parametrize("case", (DIT, LATTE, COGVIDEOX), ids=str)
def test_fastercache(case: Case, which: Any) -> None:
    """Both parts: attention runs wherever both passes do, and is held for the conditional one alone."""
    n, half = 2, HALVES.get(which, 0)

    def attends(i: int, t: float) -> bool:
        return i % 2 == 0 or not -1 < t < 681 or full(i, t)

    plain = in_one_batch(case, case.build().double(), TIMES, n)
    cond = with_attention_held(case, case.build().double(), TIMES, n, half, attends, share)
    uncond = [half_of(tensor, 1 - half, n) for tensor in plain]
    expected = rebuilt(cond, uncond, TIMES, full, published)
    model = cachekit.wrap(case.build().double(), "fastercache", cond=which)
    if which == "before":
        found = separately(case, model, TIMES, n, lambda _: (0, 1))
        close([*found[0], *found[1]], [*cond, *expected])
    else:
        close(in_one_batch(case, model, TIMES, n), joined(cond, expected, which))
    stats = model.cachekit.stats
    assert not stats.notes and not stats.dropped and stats.modules_run < stats.modules_total
    # The last step but one holds attention.
    assert not torch.allclose(cond[-2], half_of(plain[-2], half, n), atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "which"), ((DIT_PIPELINE, "first"), (LATTE_PIPELINE, "last"), (PIXART_PIPELINE, "last")), ids=str
)
def test_pipelines_that_batch_their_guidance(recipe: Recipe, which: Any) -> None:
    """Whole pipelines, whose sampler goes on from what was rebuilt, beside one whose transformer is run in full and written over.

    Single precision: a sampler's steps pass on errors of some 2^-24, a few times as large by the end.
    """
    pipe, other = recipe.build("ddim"), recipe.build("ddim")
    cachekit.wrap(pipe.transformer, fastercache(), segments=fastercache().segments[0], cond=which)
    loop = Loop(other.transformer.forward, which)
    other.transformer.forward = loop
    found, expected, plain = recipe.run(pipe, 12), recipe.run(other, 12), recipe.run(recipe.build("ddim"), 12)
    assert relative(found, expected) < 1e-5 < relative(plain, expected)
    assert [bool(record.shares) for record in pipe.transformer.cachekit.stats.records] == loop.rebuilt
    assert any(loop.rebuilt) and not pipe.transformer.cachekit.stats.notes


class Loop:
    """A transformer's forward that writes over the unconditional half of what it returns."""

    def __init__(self, original: Any, which: str) -> None:
        self.original, self.which = original, which
        self.difference = torch.empty(0)
        self.rebuilt: list[bool] = []
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        output = result if isinstance(result, Tensor) else result[0]
        t = float(torch.as_tensor(kwargs["timestep"]).flatten()[0])
        cond, uncond = output.chunk(2) if self.which == "first" else reversed(output.chunk(2))
        self.rebuilt.append(not full(len(self.rebuilt), t))
        if not self.rebuilt[-1]:
            self.difference = uncond - cond
            return result
        self.difference = published(self.difference.double(), t).float()
        uncond.copy_(cond + self.difference)
        return result


def test_a_pipeline_that_calls_its_passes_one_by_one() -> None:
    pipe = WAN_PIPELINE.build("euler")
    cachekit.wrap(pipe.transformer, "fastercache")
    found, plain = WAN_PIPELINE.run(pipe, 12), WAN_PIPELINE.run(WAN_PIPELINE.build("euler"), 12)
    records = [record for record in pipe.transformer.cachekit.stats.records if record.branch == "uncond"]
    assert [all(record.recomputed) for record in records] == [full(record.i, record.t) for record in records]
    assert not all(all(record.recomputed) for record in records) and not pipe.transformer.cachekit.stats.notes
    assert 0 < relative(found, plain) < 0.3


def test_joined_to_other_policies() -> None:
    model = cachekit.wrap(DIT.build().double(), "fastercache | first-8", cond="last")
    found = in_one_batch(DIT, model, TIMES, 1)
    plain = in_one_batch(DIT, DIT.build().double(), TIMES, 1)
    assert all(a.equal(b) for a, b in zip(found[:8], plain[:8], strict=True))
    reused = [bool(record.shares) for record in model.cachekit.stats.records]
    assert reused == [i >= 8 and not full(i, t) for i, t in enumerate(TIMES)]
    held = cachekit.wrap(DIT.build().double(), "fastercache & first-3", cond="last")
    in_one_batch(DIT, held, TIMES, 1)
    assert [bool(record.shares) for record in held.cachekit.stats.records] == [i > 2 for i in range(len(TIMES))]


@pytest.mark.parametrize("which", (*HALVES, "before"))
def test_other_reuses(which: Any) -> None:
    """What enters the site is the other pass: held, held as a difference, and a line through the last two differences."""
    steps = frozenset({0, 1, 4, 8})
    plain = DIT.build().double()
    if which == "before":
        cond, uncond = separately(DIT, plain, TIMES, 2, lambda _: (0, 1))
    else:
        cond, uncond = split(in_one_batch(DIT, plain, TIMES, 2), which)
    for reuse, beta, order in (("output", 0.0, 0), ("residual", 1.0, 0), ("residual-taylor-1", 1.0, 1), ("taylor-1", 0.0, 1)):
        memory: list[tuple[float, Tensor]] = []
        expected = []
        for i, (t, c, u) in enumerate(zip(TIMES, cond, uncond, strict=True)):
            if i in steps:
                memory.insert(0, (t, u - beta * c))
                expected.append(u)
            else:
                (t0, newest), (t1, older) = memory[0], memory[min(order, len(memory) - 1)]
                slope = (newest - older) / (t0 - t1) if t0 != t1 else 0.0
                expected.append(newest + slope * (t - t0) + beta * c)
        model = cachekit.wrap(DIT.build().double(), At(steps), segments=Segment("uncond"), reuse=reuse, cond=which)
        if which == "before":
            close(separately(DIT, model, TIMES, 2, lambda _: (0, 1))[1], expected)
        else:
            close(in_one_batch(DIT, model, TIMES, 2), joined(cond, expected, which))
