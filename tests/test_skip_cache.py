"""Skip-Cache equals a plain loop written from its description, step by step: added and native long skips, held and forecast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from skip_cache_loop import Counter, Loop, Rule
from torch import Tensor, nn
from wrapping import handle, stats
from zoo import DIT, HUNYUAN_DIT, LATTE, deeper

import cachekit
from cachekit.policies import every

# So that k = 4 leaves some between.
DEPTH = 10


DEEP_DIT = deeper(DIT, DEPTH)
DEEP_LATTE = deeper(LATTE, DEPTH)
DEEP_HUNYUAN = deeper(HUNYUAN_DIT, DEPTH)

Run = tuple[Rule, list[float]]


@st.composite
def runs(draw: st.DrawFn, orders: Sequence[int] = (0,)) -> Run:
    """A rule and the timesteps of one generation. Windows begin and end at a timestep, between two, and beyond both ends."""
    ts = sorted({25.0 * t for t in draw(st.lists(st.integers(1, 40), min_size=3, max_size=10, unique=True))}, reverse=True)
    bounds = st.sampled_from(ts) | st.integers(0, 1010).map(float)
    start = draw(st.sampled_from([1000.0, 1001.0]) | bounds)
    return Rule(draw(st.integers(1, 6)), draw(st.integers(1, 4)), start, draw(bounds), draw(st.sampled_from(orders))), ts


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def units_of(case: Case) -> list[tuple[str, ...]]:
    return [case.stack[i : i + case.unit] for i in range(0, len(case.stack), case.unit)]


def both(case: Case, rule: Rule, ts: Sequence[float], native: bool = False) -> Iterator[tuple[Tensor, Tensor, Loop, nn.Module]]:
    """Predictions of the wrapped model and of the loop, step by step, in float64."""
    model, plain = case.build().double(), case.build().double()
    fusions = {}
    if not native:
        cachekit.add_long_skips(model, fusion="paper", seed=1)
        fusions = {late: model.long_skips[f"{early}_to_{late}"].state_dict() for early, late in model.long_skips.pairs}
    reuse = f"taylor-{rule.order}" if rule.order else None
    cachekit.wrap(model, rule.policy, segments=f"skip-{rule.k}", reuse=reuse)
    loop = Loop(plain, units_of(case), rule, fusions, batch=2)
    conditioning = case.conditioning(0, Shape(dtype=torch.float64))
    with handle(model).session(steps=len(ts)):
        for t in ts:
            inputs = case.inputs(t, dtype=torch.float64, conditioning=conditioning)
            yield case.output(model(**inputs)), case.output(loop(t, **inputs)), loop, model


def check(case: Case, rule: Rule, ts: Sequence[float], native: bool = False) -> None:
    """Bit-equal where the state is held; a forecast sums the same terms in another order."""
    for ours, theirs, loop, model in both(case, rule, ts, native):
        assert torch.equal(ours, theirs) if rule.order == 0 else torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)
        recomputed = stats(model).records[-1].recomputed
        assert [path for path, ran in zip(case.stack, recomputed, strict=True) if ran] == loop.ran
        assert len(loop.ran) == (len(case.stack) if loop.is_full else 2 * rule.k * case.unit)


@given(runs())
def test_dit_with_long_skips(run: Run) -> None:
    check(DEEP_DIT, *run)


@pytest.mark.slow
@settings(max_examples=20)
@given(runs())
def test_latte_with_long_skips(run: Run) -> None:
    """In units of a spatial and a temporal block; the long skips are rearranged as the model rearranges the stream."""
    check(DEEP_LATTE, *run)


@settings(max_examples=20)
@given(runs())
def test_hunyuan_dit_with_its_own_long_skips(run: Run) -> None:
    check(DEEP_HUNYUAN, *run, native=True)


@pytest.mark.parametrize("case", [DEEP_DIT, pytest.param(DEEP_LATTE, marks=pytest.mark.slow), DEEP_HUNYUAN], ids=str)
@settings(max_examples=15)
@given(run=runs(orders=(1, 2)))
def test_the_deep_state_forecast(case: Case, run: Run) -> None:
    """Lagrange's weights through the states of the last full steps, instead of the last state."""
    check(case, *run, native=case is DEEP_HUNYUAN)


def counted(rule: Rule, ts: Sequence[float]) -> list[bool]:
    """Which steps are full, by the counter and its clearing."""
    counter, found = Counter(rule), []
    for t in ts:
        found.append(counter.full(t))
        if found[-1]:
            counter.store(torch.zeros(1))
        counter.close()
    return found


@given(runs())
def test_the_window_is_equal_to_counting(run: Run) -> None:
    """No state but the step's index and the timestep before is needed for the counter, and for its clearing."""
    rule, ts = run
    assert list(cachekit.plan(rule.policy, ts)) == counted(rule, ts)


@pytest.mark.parametrize("n", range(1, 7))
def test_every_window_is_equal_to_counting(n: int) -> None:
    """Bounds before, at, between and behind all timesteps, also the wrong way round."""
    ts = [980.0, 820.0, 660.0, 500.0, 340.0, 180.0, 20.0]
    bounds = [0.0, 1000.0, *ts, *(t - 60.0 for t in ts[:-1])]
    for start, close in itertools.product(bounds, bounds):
        rule = Rule(n, 1, start, close)
        assert list(cachekit.plan(rule.policy, ts)) == counted(rule, ts), rule


@pytest.mark.parametrize("k", range(1, 5))
@pytest.mark.parametrize("case", [DEEP_DIT, pytest.param(DEEP_LATTE, marks=pytest.mark.slow), DEEP_HUNYUAN], ids=str)
def test_every_k_and_period(case: Case, k: int) -> None:
    """One by one, in a window that begins and ends within the generation."""
    ts = [float(t) for t in range(900, 0, -110)]
    for n in range(1, 7):
        check(case, Rule(n, k, 850.0, 150.0), ts, native=case is DEEP_HUNYUAN)


class UBlock(nn.Module):
    """A block of U-ViT's kind (arXiv 2209.12152): the late ones take in an early one's output."""

    def __init__(self, width: int, fuses: bool) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if fuses else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class UViT(nn.Module):
    """Time as one more token; the middle block stands in no list."""

    def __init__(self, depth: int = DEPTH, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, channels)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.in_blocks = nn.ModuleList([UBlock(width, False) for _ in range(depth // 2)])
        self.mid_block = UBlock(width, False)
        self.out_blocks = nn.ModuleList([UBlock(width, True) for _ in range(depth // 2)])

    def enter(self, x: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(timesteps[:, None, None].to(x.dtype) / 1000)
        return torch.cat([time, self.embed(x)], dim=1)

    def leave(self, x: Tensor) -> Tensor:
        return self.head(x[:, 1:])  # type: ignore[no-any-return]

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        x, skips = self.enter(x, timesteps), []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.leave(x)


def written_out(model: UViT, counter: Counter, x: Tensor, timesteps: Tensor) -> Tensor:
    """One step of Skip-Cache on it, with nothing but the model's modules."""
    k, half = counter.rule.k, len(model.in_blocks)
    full = counter.full(float(timesteps[0]))
    x, skips = model.enter(x, timesteps), []
    for block in model.in_blocks if full else model.in_blocks[:k]:
        x = block(x)
        skips.append(x)
    if full:
        x = model.mid_block(x)
    for i in range(half) if full else range(half - k, half):
        if i == half - k:
            if full:
                counter.store(x)
            else:
                x = counter.restore()
        x = model.out_blocks[i](x, skips.pop())
    counter.close()
    return model.leave(x)


@given(runs(orders=(0, 1, 2)))
def test_a_u_vit_with_no_line_of_configuration(run: Run) -> None:
    rule, ts = run
    torch.manual_seed(0)
    model = UViT().double().eval()
    noise, data = torch.randn(2, 2, 7, 3, dtype=torch.float64)
    counter = Counter(rule)
    samples = [noise * t / 1000 + data * (1 - t / 1000) for t in ts]
    expected = [written_out(model, counter, x, torch.tensor([t, t])) for x, t in zip(samples, ts, strict=True)]
    cachekit.wrap(model, rule.policy, segments=f"skip-{rule.k}", reuse=f"taylor-{rule.order}" if rule.order else None)
    with handle(model).session(steps=len(ts)):
        for x, t, theirs in zip(samples, ts, expected, strict=True):
            ours = model(x, torch.tensor([t, t]))
            assert torch.equal(ours, theirs) if rule.order == 0 else torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


def test_the_graph_of_a_u_vit() -> None:
    found = cachekit.graph(UViT(4), torch.randn(2, 7, 3), torch.tensor([500.0, 500.0]))
    assert set(found.long_skips) == {(1, 2), (0, 3)}


def test_every_step_full_changes_nothing() -> None:
    """Added long skips run within wrapped blocks as they do without."""
    model = cachekit.add_long_skips(DEEP_DIT.build(), fusion="paper", seed=0)
    inputs = DEEP_DIT.inputs(500)
    expected = DEEP_DIT.output(model(**inputs))
    cachekit.wrap(model, every(1), segments="skip-2")
    assert torch.equal(DEEP_DIT.output(model(**inputs)), expected)


@pytest.mark.parametrize(("segments", "runs", "held"), [("skip-1", 2, 2), ((0, DEPTH // 2), DEPTH // 2, DEPTH // 2)], ids=str)
def test_the_first_step_stores_what_the_second_reuses(segments: Any, runs: int, held: int) -> None:
    """Also the early outputs that are taken in right behind the middle block, where the chain breaks.

    Only what blocks outside the segment take in is held, beside the end of each chain.
    """
    model = cachekit.wrap(UViT(), "N2-1000-50", segments=segments)
    with handle(model).session():
        for t in (900.0, 875.0):
            model(torch.randn(2, 7, 3), torch.tensor([t, t]))
        assert stats(model).bytes_held == held * 2 * 8 * 16 * 4
    assert [sum(record.recomputed) for record in stats(model).records] == [DEPTH, runs]
