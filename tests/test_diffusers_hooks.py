"""First-Block Cache and MagCache against the hooks with which diffusers has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, apply_first_block_cache, apply_mag_cache
from published import COGVIEW4, MOCHI
from running import Seen, watching
from torch import Tensor
from zoo import COGVIDEOX, FLUX, HUNYUAN_VIDEO, WAN

import cachekit
from cachekit.policies import first_block, magcache

CASES = (FLUX, WAN, COGVIDEOX, HUNYUAN_VIDEO, MOCHI, COGVIEW4)
TIMES = tuple(float(t) for t in range(950, 100, -70))
# From every step full to hardly one.
THRESHOLDS = (0.03, 0.08, 0.15, 0.25, 0.4)

cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def predictions(case: Case, model: Any, branches: Sequence[str] = ("only",), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One generation, with a pass of classifier-free guidance for each name, called as pipelines call them."""
    found = []
    conditionings = {name: case.conditioning(seed) for seed, name in enumerate(branches)}
    conditionings = {name: cast(given, dtype) for name, given in conditionings.items()}
    for t in TIMES:
        for name in branches:
            with model.cache_context(name):
                inputs = case.inputs(t, dtype=dtype, conditioning=conditionings[name], start=TIMES[0])
                found.append(case.output(model(**inputs)).clone())
    return found


def cast(conditioning: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Floating-point tensors as what the model computes in."""
    floats = {name: value for name, value in conditioning.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return conditioning | {name: value.to(dtype) for name, value in floats.items()}


def same_and_recomputed(case: Case, ours: Any, theirs: Any, **options: Any) -> list[bool]:
    """That both give the same, in the last block's every stream too; returns which steps ran the last block.

    Bit for bit, and so do the decisions agree: the residual is one subtraction, its reuse one addition, and the change a
    mean over a mean, of the same numbers here and there. Mochi's last block hands the text on as it came and nothing reads it
    any more: diffusers holds a residual for it all the same, and here it has none.
    """
    streams = slice(1) if case is MOCHI else slice(None)
    seen: dict[bool, Seen] = {True: [], False: []}
    found = {}
    for cached, model in ((True, ours), (False, theirs)):
        with watching(model, case.stack[-1:], seen[cached]):
            found[cached] = predictions(case, model, **options)
    for i, (a, b) in enumerate(zip(found[True], found[False], strict=True)):
        assert a.equal(b), f"step {i} differs by up to {(a - b).abs().max()}"
    for (_, _, results), (_, _, expected) in zip(seen[True], seen[False], strict=True):
        assert all(a.equal(b) for a, b in zip(results[streams], expected[streams], strict=True))
    return [record.recomputed[-1] for record in ours.cachekit.stats.records]


@cases
def test_first_block_cache(case: Case) -> None:
    """Step by step at every threshold. Each stream of two gets its own residual, in diffusers as here."""
    counts = []
    for threshold in THRESHOLDS:
        theirs = case.build()
        apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold))
        full = same_and_recomputed(case, cachekit.wrap(case.build(), first_block(threshold)), theirs)
        counts.append(sum(full))
    # Else the thresholds would compare nothing.
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] and min(counts) < len(TIMES) / 2


@pytest.mark.parametrize("case", (WAN, COGVIEW4), ids=str)
def test_first_block_cache_with_two_branches(case: Case) -> None:
    """Each pass of classifier-free guidance compares with its own past."""
    theirs = case.build()
    apply_first_block_cache(theirs, FirstBlockCacheConfig(0.25))
    ours = cachekit.wrap(case.build(), first_block(0.25))
    full = same_and_recomputed(case, ours, theirs, branches=("cond", "uncond"))
    assert 2 < sum(full) < 2 * len(TIMES)


def test_first_block_cache_in_half_precision() -> None:
    theirs = FLUX.build().bfloat16()
    apply_first_block_cache(theirs, FirstBlockCacheConfig(0.25))
    ours = cachekit.wrap(FLUX.build().bfloat16(), first_block(0.25))
    full = same_and_recomputed(FLUX, ours, theirs, dtype=torch.bfloat16)
    assert 1 < sum(full) < len(TIMES)


@cases
@pytest.mark.parametrize("threshold", (0.02, 0.06, 0.3))
def test_magcache(case: Case, threshold: float) -> None:
    """On the calibration's own schedule, for ratios that the hooks hold in single precision, as here double: no tie is near."""
    ratios = torch.linspace(1.02, 0.93, len(TIMES)) + 0.02 * torch.rand(len(TIMES), generator=torch.Generator().manual_seed(3))
    theirs = case.build()
    apply_mag_cache(theirs, MagCacheConfig(threshold, num_inference_steps=len(TIMES), mag_ratios=ratios))
    ours = cachekit.wrap(case.build(), magcache(tuple(ratios.tolist()), TIMES, threshold))
    found = {}
    found[True], found[False] = (predictions(case, model) for model in (ours, theirs))
    for a, b in zip(found[True], found[False], strict=True):
        assert a.equal(b)
    full = [record.recomputed[-1] for record in ours.cachekit.stats.records]
    assert all(full[:3]) and not all(full)


def test_magcache_passes_a_second_stream_on_as_it_came_and_here_it_gets_its_residual() -> None:
    """diffusers' hook holds the main stream's residual alone. The text's tokens leave the stack, and no model reads them then."""
    seen: dict[str, Seen] = {"ours": [], "theirs": []}
    ratios = (1.0,) * len(TIMES)
    theirs = COGVIDEOX.build()
    apply_mag_cache(theirs, MagCacheConfig(num_inference_steps=len(TIMES), mag_ratios=torch.tensor(ratios)))
    ours = cachekit.wrap(COGVIDEOX.build(), magcache(ratios, TIMES))
    for name, model in (("ours", ours), ("theirs", theirs)):
        with watching(model, COGVIDEOX.stack[-1:], seen[name]):
            predictions(COGVIDEOX, model)
    reused = [record.recomputed[-1] for record in ours.cachekit.stats.records].index(False)
    (_, _, (main, text)), (_, _, (their_main, their_text)) = seen["ours"][reused], seen["theirs"][reused]
    assert main.equal(their_main) and not text.equal(their_text)
