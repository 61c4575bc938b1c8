"""Every cached generation equals the one that a plain loop makes, which knows nothing of the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from drawing import fronts, heun, policies, probes, runs
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Reference, Site
from stack_blocks import ORDERED
from stack_runs import Run, conditioning, given_time, samples, tensor_of
from stacks import CHANNELS, CONTEXT, Stack, visits_of
from torch import Tensor
from wrapping import Case, cases, ranges, segments, stats

import cachekit
from cachekit import Forecast, Segment
from cachekit.reuse import parse_reuse
from cachekit.signals import signals
from cachekit.spec import parse_policy


def sites_of(case: Case, n: int) -> list[Site]:
    """The sites of a case, on a stack of n blocks."""

    def site(written: Any, visits: Sequence[int]) -> Site:
        own = written if isinstance(written, Segment) else Segment()
        policy = parse_policy(case.policy if own.policy is None else own.policy).policy
        reuse = parse_reuse(case.reuse if own.reuse is None else own.reuse)
        assert isinstance(reuse, Forecast)
        return Site(visits, policy, reuse)

    if case.segments == "model":
        return [site("model", ())]
    written = case.segments if isinstance(case.segments, list) else [case.segments]
    return [site(item, visits) for item, visits in zip(written, ranges(case.segments, n), strict=True) if len(visits)]


def both(
    case: Case, run: Run, sites: Sequence[Site] | None = None, adapter: cachekit.Adapter | None = None
) -> Iterator[tuple[Tensor, Tensor, Stack, Sequence[Site]]]:
    """Step by step on the same samples: predictions of the wrapped model and of the loop, the model, what the loop holds."""
    model, plain = case.wrap(case.build().double(), adapter=adapter), case.build().double()
    sites = sites_of(case, len(visits_of(plain))) if sites is None else sites
    loop = Reference(plain, sites, len(run.times) if case.explicit else None)
    xs, y = samples(case.build().double(), run), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad(), case.session(model, run.times):
        for t, x in zip(run.times, xs, strict=True):
            arguments = x, given_time(case.spec, t, run.batch), y
            yield tensor_of(model(*arguments)), loop(t, *arguments), model, sites


def same(a: Tensor, b: Tensor, sites: Sequence[Site]) -> bool:
    """Bit by bit where a value is only held, whatever the input correction.

    A forecast adds up the same terms in another order: a few roundings of 2^-53 each, of terms at most 50 times (the bound) as
    large as values around 10; the blocks behind pass an error on at most about ten times as large, over at most eight of them.
    What is observed is far less, and one wrong term shows in the first digits.
    """
    return torch.equal(a, b) if all(site.reuse.highest == 0 for site in sites) else torch.allclose(a, b, rtol=1e-8, atol=1e-8)


doubles = runs.map(lambda run: replace(run, dtype=torch.float64))


@given(cases(), doubles, st.booleans())
def test_equal_to_the_plain_loop(case: Case, run: Run, twice: bool) -> None:
    """Any stack with its long skips, streams and glue; any segments, policy (probes too) and reuse; any kind of solver."""
    case = case.wide()
    # With both streams of one shape, blocks that swap them look as if they did not: no tensor tells which is which.
    assert case.spec.tokens != CONTEXT
    run = replace(run, times=heun(run.times)) if twice else run
    for ours, theirs, _, sites in both(case, run):
        assert same(ours, theirs, sites)


@given(cases(layouts=("hunyuan", "uvit", "uvit-no-middle"), betas=(1.0,)), doubles)
def test_residuals_across_long_skips_equal_the_plain_loop(case: Case, run: Run) -> None:
    """The residual of a long skip's source counts from where the segment was entered, as that of its end does."""
    for ours, theirs, _, sites in both(case.wide(), run):
        assert same(ours, theirs, sites)


@given(cases(model=False, layouts=("latte",), betas=(0.0, 1.0), plain=True), st.data(), doubles)
def test_units_of_blocks_equal_the_plain_loop(case: Case, data: st.DataObject, run: Run) -> None:
    """Where an adapter says that blocks go in pairs and that only the layout changes between them, segments count pairs."""
    spatial, temporal = r"spatial\.\d+", r"temporal\.\d+"
    adapter = cachekit.Adapter(unit=2, relayout=((spatial, temporal), (temporal, spatial)))
    units = data.draw(segments(case.spec.depth, model=False))
    case = replace(case.wide(), segments=units, policy=data.draw(policies()))
    sites = [replace(site, visits=range(2 * site.visits[0], 2 * site.visits[-1] + 2)) for site in sites_of(case, case.spec.depth)]
    for ours, theirs, _, _ in both(case, run, sites, adapter):
        assert same(ours, theirs, sites)


@given(cases(model=False, layouts=ORDERED, plain=True), probes | fronts, st.integers(1, 8), doubles)
def test_probes_of_blocks_that_write_into_their_input(case: Case, policy: Any, at: int, run: Run) -> None:
    """What entered them is noted before they do."""
    depth = case.spec.depth
    assume(depth >= 2)
    spec = replace(case.spec, in_place=frozenset(range(depth)))
    case = replace(case, spec=spec, policy=policy, segments=(1 + (at - 1) % (depth - 1), depth)).wide()
    for ours, theirs, _, sites in both(case, run):
        assert same(ours, theirs, sites)


@given(cases(layouts=ORDERED, plain=True), doubles)
def test_only_the_end_of_a_segment_is_held(case: Case, run: Run) -> None:
    """In a plain chain that is one tensor (B, N, D) for each remembered step; for the whole prediction one of the sample's size."""
    case = replace(case, explicit=True)
    for _, _, model, sites in both(case, run):
        size = run.batch * case.spec.tokens * 8
        held = 0
        for site in sites:
            remembered = [len(entries) for (v, _), entries in site.histories.items() if not site.visits or v == site.visits[-1]]
            held += size * (case.spec.width if site.visits else CHANNELS) * min(remembered[0], site.reuse.length)
        probing = size * case.spec.width * sum(len(signals(site.policy.required())) for site in sites)
        assert stats(model).bytes_held == held + probing
