"""A decision for each sample, of modules within blocks and of published methods: exact against each sample run alone."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from in_batch import SCHEDULE, TIMES, Arbitrary, Listed, assert_exact, batches, cutting, listed, of_architecture
from zoo import DIT, FLUX, HUNYUAN_DIT, LATTE, WAN

import cachekit
from cachekit.policies import adacache, dbcache, easycache, speca, teacache

MODULES = ("attn", "mlp", "modules", cachekit.Segment(1, 3, modules=("attn", "mlp")))


@pytest.mark.parametrize("case", (DIT, LATTE, HUNYUAN_DIT, FLUX), ids=str)
@settings(max_examples=2)
@given(batches, st.sampled_from(MODULES), st.sampled_from(("output", "taylor-1")), st.data())
def test_modules_within_blocks(case: Case, batch: tuple[int, int], where: Any, reuse: str, data: st.DataObject) -> None:
    """Attention and MLPs of blocks that run for everyone."""
    count, passes = batch
    steps = data.draw(listed(count, len(TIMES)))
    ours = cachekit.wrap(case.build().double(), Listed((frozenset(), *steps)), segments=where, reuse=reuse, per_sample=passes)
    found = of_architecture(case, ours, lambda given: given, count * passes, TIMES)
    others, theirs = [], []
    for g in range(count):
        others.append(cachekit.wrap(case.build().double(), Listed((steps[g],)), segments=where, reuse=reuse))
        theirs.append(of_architecture(case, others[-1], cutting(count * passes, g, passes), count * passes, TIMES))
    assert_exact(found, theirs, passes)
    stats, alone = ours.cachekit.stats, [other.cachekit.stats for other in others]
    # Of the first call, which is run once more on a sample, all modules ran.
    tried = len(stats.records[0].modules) / count
    assert stats.modules_total == alone[0].modules_total > 0
    assert stats.modules_run == pytest.approx(sum(each.modules_run for each in alone) / count + tried)
    assert not stats.notes and not stats.dropped


@pytest.mark.parametrize("segments", ((2, 5), cachekit.Segment(2, 5, each=True)), ids=("one", "each"))
def test_blocks_and_modules_beside_each_other(segments: Any) -> None:
    """A block that runs for some samples takes its modules along; a decision for each block is one for each sample of it."""
    where = [segments, cachekit.Segment(1, 2, modules="attn", policy=Arbitrary())]
    count = 3
    ours = cachekit.wrap(DIT.build().double(), Arbitrary(), segments=where, per_sample=True)
    found = of_architecture(DIT, ours, lambda given: given, count, TIMES)
    theirs = []
    for g in range(count):
        alone = cachekit.wrap(DIT.build().double(), Arbitrary(), segments=where)
        theirs.append(of_architecture(DIT, alone, cutting(count, g, 1), count, TIMES))
    assert_exact(found, theirs, 1)
    shares = [record.shares for record in ours.cachekit.stats.records if record.shares]
    assert shares and any(record.module_shares for record in ours.cachekit.stats.records)
    # One decision leaves the blocks together.
    assert all(len({*each[2:5]}) == 1 for each in shares) == (segments == (2, 5))


# Each with its own signal: the modulated input, the model's input and output, a check of the last block, the first block.
METHODS = (
    teacache(0.6, coefficients=(1.0, 0.0)),
    easycache(0.3, warm_up=1),
    speca(0.35, warm_up=1),
    adacache(),
    dbcache(2, 1, 0.2, warm_up=1),
)


@pytest.mark.parametrize("method", METHODS, ids=("teacache", "easycache", "speca", "adacache", "dbcache"))
@pytest.mark.parametrize("passes", (1, 2))
def test_published_methods(method: Any, passes: int) -> None:
    """On each image, or on each pair of guidance, what the authors have for a whole batch."""
    count = 2
    ours = cachekit.wrap(WAN.build().double(), method, per_sample=passes)
    found = of_architecture(WAN, ours, lambda given: given, count * passes, SCHEDULE)
    theirs = []
    for g in range(count):
        alone = cachekit.wrap(WAN.build().double(), method)
        theirs.append(of_architecture(WAN, alone, cutting(count * passes, g, passes), count * passes, SCHEDULE))
        assert not all(all(record.recomputed) for record in alone.cachekit.stats.records)
    assert_exact(found, theirs, passes)
    assert not any("one decision" in note for note in ours.cachekit.stats.notes)
