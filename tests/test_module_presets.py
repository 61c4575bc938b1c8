"""Published methods on modules: against a loop, against diffusers' hooks where there are any, and identities between them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Shape
from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_pyramid_attention_broadcast, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from drawing import At, schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_modules import NAMES, Held, run
from published import COGVIEW4, MOCHI
from running import assert_equal, generate
from test_modules import close, ours
from torch import Tensor, nn
from zoo import COGVIDEOX, DIT, FLUX, HUNYUAN_DIT, HUNYUAN_VIDEO, LATTE, PIXART, SD3, WAN

import cachekit
from cachekit import ConfigError
from cachekit.policies import every, fora, l2c, pab, scheduled, since, taylorseer, tgate
from cachekit.policies.reuses import TaylorSeer

TIMES = tuple(float(t) for t in range(950, 0, -100))
models = pytest.mark.parametrize("case", (DIT, PIXART, LATTE, HUNYUAN_DIT, FLUX, WAN, MOCHI, COGVIEW4), ids=str)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@models
def test_fora(case: Case) -> None:
    holds = [Held(kind, lambda i, t: i % 3 == 0 or i == len(TIMES) - 1) for kind in NAMES[case.name]]
    expected = run(case, case.build(), (*TIMES[:-1], 30.0), holds)
    found, model = ours(case, "fora-3", (*TIMES[:-1], 30.0))
    assert_equal(found, expected)
    assert [bool(sum(record.modules)) for record in model.cachekit.stats.records] == holds[0].ran


@models
def test_taylor_of_order_0_is_fora(case: Case) -> None:
    """Whatever the family of forecasts."""
    expected = ours(case, "fora-4", TIMES)[0]
    for reuse in ("taylor-0", "taylorseer-0", "hermite-0"):
        assert_equal(ours(case, "fora-4", TIMES, reuse=reuse)[0], expected)


def broadcasts(n: int, window: tuple[float, float] = (100, 800)) -> Any:
    """PAB's rule."""
    return lambda i, t: i % n == 0 or not window[0] < t < window[1]


@models
@pytest.mark.parametrize(
    ("spec", "periods", "window"), (("pab", (2, 3, 6), (100, 800)), ("pab-3-2-4-930-450", (3, 2, 4), (450, 930)))
)
def test_pab(case: Case, spec: str, periods: tuple[int, int, int], window: tuple[float, float]) -> None:
    holds = [
        Held("attn", broadcasts(periods[0], window), places="spatial"),
        Held("attn", broadcasts(periods[1], window), places="temporal"),
        Held("cross_attn", broadcasts(periods[2], window)),
    ]
    expected = run(case, case.build(), TIMES, holds)
    found = ours(case, spec, TIMES)[0]
    assert_equal(found, expected)
    assert not all(a.equal(b) for a, b in zip(found, generate(case.build(), case, TIMES), strict=True))


@models
def test_pab_of_period_1_is_uncached(case: Case) -> None:
    assert_equal(ours(case, pab(1, 1, 1), TIMES)[0], generate(case.build(), case, TIMES))
    assert_equal(ours(case, pab(2, 3, 6, start=50, close=0), TIMES)[0], generate(case.build(), case, TIMES))


_ONE_LIST: Any = {"spatial_attention_block_identifiers": ("^transformer_blocks", "^single_transformer_blocks", "^blocks")}
HOOKED = (DIT, PIXART, LATTE, HUNYUAN_DIT, HUNYUAN_VIDEO, FLUX, SD3, COGVIDEOX, WAN, MOCHI, COGVIEW4)


@pytest.mark.parametrize("case", HOOKED, ids=str)
@pytest.mark.parametrize(("periods", "window"), (((2, 3, 4), (200, 700)), ((3, 2, 5), (50, 900))), ids=str)
def test_pab_equals_diffusers_hooks(case: Case, periods: tuple[int, int, int], window: tuple[int, int]) -> None:
    """Bit for bit. Latte's lists and HunyuanVideo's are told apart by their beginning: by diffusers' own identifiers temporal
    blocks count as spatial ones, and a text refiner outside the stack is cached too."""
    now = {"t": 0.0}
    model = case.build()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=periods[0],
        temporal_attention_block_skip_range=periods[1],
        cross_attention_block_skip_range=periods[2],
        cross_attention_timestep_skip_range=window,
        spatial_attention_timestep_skip_range=window,
        temporal_attention_timestep_skip_range=window,
        temporal_attention_block_identifiers=("^temporal_transformer_blocks",),
        cross_attention_block_identifiers=("^transformer_blocks", "^blocks"),
        current_timestep_callback=lambda: now["t"],
        **_ONE_LIST,
    )
    apply_pyramid_attention_broadcast(model, config)
    conditioning, expected = case.conditioning(), []
    for t in TIMES:
        now["t"] = t
        expected.append(case.output(model(**case.inputs(t, conditioning=conditioning, start=TIMES[0]))).clone())
    found = ours(case, pab(*periods, start=window[1], close=window[0]), TIMES)[0]
    assert_equal(found, expected)
    assert not found[5].equal(generate(case.build(), case, TIMES)[5])


@pytest.mark.parametrize("case", HOOKED, ids=str)
@pytest.mark.parametrize(("n", "order"), ((2, 1), (3, 2), (3, 0)))
def test_taylorseer_equals_diffusers_hooks(case: Case, n: int, order: int) -> None:
    """Of every module, in double precision: the hooks add up differences, here values are weighted, so that they agree to rounding.

    The weights' absolute sum is below 10 and each module passes an error on about as large as it is: see ``close``.
    """
    # CogView4's blocks call their one MLP twice, on the image's tokens and on the text's. A hook has one state for each module,
    # takes the second call for another step, and would hand the text's value on to the image: the shapes don't fit.
    kinds, segments = (("attn",), "attn") if case is COGVIEW4 else (tuple(NAMES[case.name]), "modules")
    names = "|".join(name for kind in kinds for name in NAMES[case.name][kind])
    model = case.build().double()
    config = TaylorSeerCacheConfig(
        cache_interval=n,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float64,
        cache_identifiers=[rf"(single_|temporal_)?(transformer_)?blocks\.\d+\.({names})"],
    )
    apply_taylorseer_cache(model, config)
    _set_cache_context(model, CacheContext("only"))
    full = frozenset(i for i in range(len(TIMES)) if i < 2 or (i - 3) % n == 0)
    expected = double(case, model)
    found = ours(case, At(full), TIMES, torch.float64, segments=segments, reuse=TaylorSeer(order, axis="grid"))[0]
    close(found, expected)
    plain = double(case, case.build().double())
    assert not all(torch.allclose(a, b) for a, b in zip(found, plain, strict=True))


def double(case: Case, model: nn.Module) -> list[Tensor]:
    """One generation in double precision."""
    return generate(model, case, TIMES, shape=Shape(dtype=torch.float64))


def test_taylorseer_on_modules_is_a_choice_of_segments() -> None:
    """The preset's schedule and forecast, with every module's output in place of the stack's."""
    full = [True, True, True, False, False, True, False, False, True, False]
    holds = [Held(kind, lambda i, t: full[i], formula=line) for kind in NAMES[DIT.name]]
    expected = run(DIT, DIT.build().double(), TIMES, holds)
    close(ours(DIT, taylorseer(3, 1), TIMES, torch.float64, segments="modules")[0], expected)


def line(values: list[tuple[float, Tensor]], now: float) -> Tensor:
    """F + (F - F_prev) / (t - t_prev) x."""
    (t, newest), (before, previous) = values[:2]
    return newest + (newest - previous) / (t - before) * (now - t)


@pytest.mark.parametrize("case", (DIT, PIXART, LATTE), ids=str)
@pytest.mark.parametrize(("m", "k"), ((6, 2), (7, 3), (1, 1), (20, 4)))
def test_tgate(case: Case, m: int, k: int) -> None:
    """The authors' scheduler, step by step."""

    def self_attention(i: int, t: float) -> bool:
        if i < m - 1:
            return i <= 2 or i % k == 0
        return True

    holds = [Held("attn", self_attention), Held("cross_attn", lambda i, t: i < m)]
    expected = run(case, case.build(), TIMES, holds)
    assert_equal(ours(case, f"tgate-{m}-{k}", TIMES)[0], expected)
    assert_equal(ours(case, tgate(m, k), TIMES)[0], expected)


def marked(marks: Sequence[int], i: int, t: float) -> bool:
    """Whether a step has a mark."""
    return marks[i] == 1


@settings(max_examples=12)
@given(st.data(), st.sampled_from((DIT, PIXART, LATTE)), schedules(max_size=6))
def test_masks(data: st.DataObject, case: Case, times: Sequence[float]) -> None:
    """Of kinds, and of single modules, with diffusers' names too."""
    units, masks, holds = len(case.stack) // case.unit, dict[str, Any](), list[Held]()
    also = {"attn": "attn1", "cross_attn": "attn2", "mlp": "ff"}
    marks: Any = st.lists(st.integers(0, 1), min_size=len(times), max_size=len(times))
    for kind in data.draw(st.sets(st.sampled_from(sorted(NAMES[case.name])), min_size=1)):
        written = data.draw(st.sampled_from((kind, also[kind])))
        for unit in data.draw(st.just([None]) | st.lists(st.integers(0, units - 1), min_size=1, unique=True)):
            drawn = data.draw(marks)
            masks[written if unit is None else f"{written}-{unit}"] = drawn
            ends = (0, None) if unit is None else (unit, unit + 1)
            holds.append(Held(kind, functools.partial(marked, drawn), *ends))
    assert_equal(ours(case, scheduled(masks), times)[0], run(case, case.build(), times, holds))


def router(steps: int, depth: int) -> dict[str, Tensor]:
    """Logits as the authors ship them: of the last step first, attention and MLP in turn."""
    generator = torch.Generator().manual_seed(3)
    return {f"{index}.prob": torch.randn(2 * depth, generator=generator) * 3 for index in range(steps)}


def test_learning_to_cache_reads_the_authors_router(tmp_path: Path) -> None:
    """In their loop the index falls; at odd ones everything runs, at even ones what the router lets run."""
    logits, file = router(len(TIMES), 6), tmp_path / "router.pt"
    torch.save({"routers": logits}, file)

    def runs(k: int) -> Any:
        def decide(i: int, t: float) -> bool:
            index = len(TIMES) - 1 - i
            return index % 2 == 1 or float(logits[f"{index}.prob"][k].sigmoid()) > 0.1

        return decide

    holds = [Held(kind, runs(2 * b + j), b, b + 1) for b in range(6) for j, kind in enumerate(("attn", "mlp"))]
    expected = run(DIT, DIT.build(), TIMES, holds)
    found, model = ours(DIT, l2c(file), TIMES)
    assert_equal(found, expected)
    assert 0 < model.cachekit.stats.modules_total - model.cachekit.stats.modules_run < len(TIMES) * 6
    masks = {f"{held.kind}-{held.start}": [int(ran) for ran in held.ran] for held in holds}
    (tmp_path / "masks.json").write_text(json.dumps(masks))
    assert_equal(ours(DIT, l2c(tmp_path / "masks.json"), TIMES)[0], expected)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    (
        ("none.pt", None, "can't be read"),
        ("a.pt", b"no pickle", "can't be read"),
        ("a.json", b"{", "can't be read"),
        ("a.json", b"[1]", "no object of masks"),
        ("a.json", b'{"attn": [1, 0], "mlp": [1]}', "masks of \\[1, 2\\] steps"),
        ("a.json", b'{"attn": []}', "a schedule of no steps"),
        ("a.json", b'{"ATTN": [1]}', "write a kind of module such as 'attn'"),
    ),
)
def test_files_that_are_no_masks(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        l2c(tmp_path / name)


@pytest.mark.parametrize("state", ({"routers": {"1.prob": torch.ones(4)}}, {"model": {}}, [1]))
def test_other_checkpoints_are_no_routers(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="give a router of the authors' DiT"):
        l2c(tmp_path / "a.pt")


def test_masks_of_another_number_of_steps() -> None:
    """A session that knows better raises; without one, what lies behind the masks is recomputed."""
    with pytest.raises(ConfigError, match="this schedule is for 3 steps, and the session has 10"):
        ours(DIT, scheduled({"attn": [True, False, False]}), TIMES)
    model = cachekit.wrap(DIT.build(), scheduled({"attn": [True, False, False]}))
    generate(model, DIT, TIMES)
    ran = [sum(record.modules) for record in model.cachekit.stats.records]
    assert ran == [12, 6, 6] + [12] * 7
    with pytest.raises(ConfigError, match="write one of 'attn'"):
        cachekit.wrap(DIT.build(), scheduled({"norm": [True]}))


def test_since_and_windows() -> None:
    assert list(cachekit.plan(since(3), TIMES[:5])) == [True, False, False, True, True]
    assert list(cachekit.plan("pab-2", TIMES)) == [True, True, True, False, True, False, True, False, True, True]
    with pytest.raises(ValueError, match="the first of the two is the larger one"):
        pab(start=100, close=100)


@pytest.mark.parametrize("preset", (fora(3), pab(), tgate(4, 2), scheduled({"attn": [True] + [False] * 9})), ids=str)
def test_presets_combine_and_give_way(preset: Any) -> None:
    """``| every-1`` makes every step full; other segments and another reuse win."""
    model = ours(PIXART, preset | every(1), TIMES)[1]
    assert model.cachekit.stats.modules_run == model.cachekit.stats.modules_total
    model = ours(PIXART, preset, TIMES, segments="middle")[1]
    assert 0 < model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total and not model.cachekit.stats.modules_total
    found, other = ours(PIXART, preset, TIMES)[0], ours(PIXART, preset, TIMES, reuse="taylor-1")[0]
    assert found[0].equal(other[0])
