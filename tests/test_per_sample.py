"""A decision for each sample of a batch: exact against each sample run alone, on random stacks and on real small models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case as Architecture
from drawing import REUSES, policies, probes, reuses, schedules, stack_specs
from hypothesis import given, settings
from hypothesis import strategies as st
from in_batch import TIMES, Arbitrary, Listed, assert_exact, batches, cutting, listed, of_architecture, of_one
from published import COGVIEW4
from stack_blocks import StackSpec
from stack_runs import Run, conditioning, given_time, samples, tensor_of
from stacks import Stack, build, visits_of
from torch import Tensor
from wrapping import segments, stats
from zoo import CASES, DIT, FLUX, HUNYUAN_DIT, LATTE

import cachekit
from cachekit.policies import change, front_change


def given_samples(model: Any, spec: StackSpec, run: Run, xs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Predictions for samples that don't depend on them, in a session that knows the steps."""
    with torch.no_grad(), model.cachekit.session(timesteps=run.times):
        return [tensor_of(model(x, given_time(spec, t, len(x)), y)).clone() for t, x in zip(run.times, xs, strict=True)]


def in_batch_and_alone(
    spec: StackSpec, run: Run, passes: int, wrap: Any, wrap_alone: Any
) -> tuple[Stack, list[Stack], list[Tensor], list[list[Tensor]]]:
    """Predictions of a batch, and of each of its samples."""
    xs, y = samples(build(spec), run), conditioning(spec, run.batch, run.seed)
    y = y.to(run.dtype) if y.is_floating_point() else y
    ours = wrap(build(spec).to(run.dtype))
    found = given_samples(ours, spec, run, xs, y)
    others, theirs = [], []
    for g in range(run.batch // passes):
        others.append(wrap_alone(build(spec).to(run.dtype), g))
        theirs.append(given_samples(others[-1], spec, run, [of_one(x, g, passes) for x in xs], of_one(y, g, passes)))
    return ours, others, found, theirs


def assert_counted(ours: Any, others: Sequence[Any], spec: StackSpec) -> None:
    """A batch counts what its samples alone count, in shares; and the first call once more for one of them."""
    assert not any("one decision" in note for note in stats(ours).notes)
    count = len(others)
    tried = len(visits_of(build(spec))) / count
    assert stats(ours).blocks_run == pytest.approx(sum(stats(other).blocks_run for other in others) / count + tried)
    assert stats(ours).blocks_total == stats(others[0]).blocks_total


# Those that can be split: no block writes into what it is given, and what a block returns beside its streams, which the model adds
# to its result as a mean over the batch, is left out.
specs = stack_specs().map(lambda spec: replace(spec, in_place=frozenset(), extras=0, tokens=max(spec.tokens, 4)))
schedule = schedules(max_size=8)


@given(specs, batches, schedule, st.integers(0, 9), reuses(), st.data())
def test_each_sample_is_as_if_it_ran_alone(
    spec: StackSpec, batch: tuple[int, int], times: tuple[float, ...], seed: int, reuse: Any, data: st.DataObject
) -> None:
    """Any stack with its long skips, streams and glue, any segments, any samples recomputed at any steps, any reuse."""
    count, passes = batch
    where = data.draw(segments(len(visits_of(build(spec)))))
    steps = data.draw(listed(count, len(times)))
    run = Run(times, seed, count * passes, dtype=torch.float64)

    def wrapped(model: Stack, told: list[frozenset[int]], per_sample: int) -> Stack:
        put = [where] if not isinstance(where, list) else where
        put = [replace(item, policy=None) if isinstance(item, cachekit.Segment) else item for item in put]
        put = [replace(each, policy=Listed(tuple(told))) for item in put for each in cachekit.segments.parse_segments(item)]
        return cachekit.wrap(model, segments=put, reuse=reuse, per_sample=per_sample)

    ours, others, found, theirs = in_batch_and_alone(
        spec,
        run,
        passes,
        lambda model: wrapped(model, [frozenset(), *steps], passes),
        lambda model, g: wrapped(model, [steps[g]], 0),
    )
    assert_exact(found, theirs, passes)
    assert_counted(ours, others, spec)


signals = st.just(Arbitrary()) | policies(probe=True).map(lambda p: Arbitrary() & p) | probes


@given(specs, batches, schedule, st.integers(0, 9), st.sampled_from(REUSES), signals, st.integers(1, 7))
def test_each_sample_is_judged_by_its_own_signals(
    spec: StackSpec, batch: tuple[int, int], times: tuple[float, ...], seed: int, reuse: str, policy: Any, at: int
) -> None:
    """A policy that looks at the model, with a state for each sample."""
    count, passes = batch
    n = len(visits_of(build(spec)))
    if n < 2:
        return
    where = (1 + (at - 1) % (n - 1), n)
    ours, others, found, theirs = in_batch_and_alone(
        spec,
        Run(times, seed, count * passes, dtype=torch.float64),
        passes,
        lambda model: cachekit.wrap(model, policy, segments=where, reuse=reuse, per_sample=passes),
        lambda model, _: cachekit.wrap(model, policy, segments=where, reuse=reuse),
    )
    assert_exact(found, theirs, passes)
    assert_counted(ours, others, spec)


@pytest.mark.parametrize("case", (*CASES, COGVIEW4), ids=str)
@settings(max_examples=4)
@given(batches, st.sampled_from(("middle", "all", (1, 3), "model")), st.sampled_from(REUSES), st.data())
def test_architectures(case: Architecture, batch: tuple[int, int], where: Any, reuse: str, data: st.DataObject) -> None:
    """Frames folded into the batch, long skips, joined streams, masks, tables and rotary embeddings that have no batch."""
    count, passes = batch
    steps = data.draw(listed(count, len(TIMES)))
    # Several predict another number of channels than they take: no residual.
    reuse = "output" if where == "model" and "residual" in reuse else reuse
    ours = cachekit.wrap(case.build().double(), Listed((frozenset(), *steps)), segments=where, reuse=reuse, per_sample=passes)
    found = of_architecture(case, ours, lambda given: given, count * passes, TIMES)
    others, theirs = [], []
    for g in range(count):
        others.append(cachekit.wrap(case.build().double(), Listed((steps[g],)), segments=where, reuse=reuse))
        theirs.append(of_architecture(case, others[-1], cutting(count * passes, g, passes), count * passes, TIMES))
    assert_exact(found, theirs, passes)
    ran = sum(other.cachekit.stats.blocks_run for other in others) / count
    assert ours.cachekit.stats.blocks_run == pytest.approx(ran + len(case.stack) / count)
    assert not ours.cachekit.stats.notes and not ours.cachekit.stats.dropped


@pytest.mark.parametrize("policy", (change, front_change))
@pytest.mark.parametrize("case", (DIT, LATTE, HUNYUAN_DIT, FLUX), ids=str)
def test_thresholds_on_architectures(case: Architecture, policy: Any) -> None:
    """A threshold on each sample's own change, up to one between theirs."""
    count = 3
    for threshold in (0.25, 0.2, 0.15, 0.1):
        ours = cachekit.wrap(case.build().double(), policy(threshold), segments=(2, None), per_sample=True)
        found = of_architecture(case, ours, lambda given: given, count, TIMES)
        theirs = []
        for g in range(count):
            alone = cachekit.wrap(case.build().double(), policy(threshold), segments=(2, None))
            theirs.append(of_architecture(case, alone, cutting(count, g, 1), count, TIMES))
        assert_exact(found, theirs, 1)
        if any(record.shares for record in ours.cachekit.stats.records):
            return
    pytest.fail("no threshold lies between the samples' changes")
