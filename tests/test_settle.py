"""Order and share of the input's change: against errors whose least is known."""

from __future__ import annotations

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachekit import Forecast
from cachekit.candidates import Candidate
from cachekit.settle import settled


def candidate(beta: float, order: int = 2) -> Candidate:
    return Candidate("middle", Forecast(order, beta=beta, axis="grid"), (0, 3, 6))


def degree(c: Candidate) -> float:
    return c.reuse.order + c.reuse.blend


@given(
    share=st.floats(-0.5, 1.5),
    order=st.floats(-1.0, 4.0),
    start=st.sampled_from([0.0, 0.5, 1.0]),
    whole=st.integers(0, 3),
    slope=st.floats(0.1, 10.0),
)
def test_the_least_of_a_valley(share: float, order: float, start: float, whole: int, slope: float) -> None:
    """With tries enough it ends within the narrowest steps of the least that is allowed."""

    def error(c: Candidate) -> float:
        return slope * (c.reuse.beta - share) ** 2 + (degree(c) - order) ** 2

    found = settled(candidate(start, whole), lambda a, b: error(a) < error(b), tries=100, highest=3)
    assert abs(found.reuse.beta - min(max(share, 0.0), 1.0)) <= 1 / 32
    assert abs(degree(found) - min(max(order, 0.0), 3.0)) <= 1 / 8
    assert found.recompute == (0, 3, 6) and found.site == "middle" and found.reuse.axis == "grid" and found.reuse.length <= 4


@given(least=st.floats(1.0, 50.0))
def test_the_bound(least: float) -> None:
    """It ends within a quarter of a doubling of the best."""
    found = settled(
        candidate(0.0), lambda a, b: abs(log2(a.reuse.bound / least)) < abs(log2(b.reuse.bound / least)), tries=100, highest=2
    )
    assert abs(log2(found.reuse.bound / least)) <= 1 / 4


def test_a_valley_that_runs_aslant() -> None:
    """Where order and share pay only together, they are found together."""

    def error(c: Candidate) -> float:
        along, across = degree(c) + 4 * c.reuse.beta, degree(c) - 4 * c.reuse.beta
        return (along - 4.0) ** 2 + 100 * (across - 2.0) ** 2

    found = settled(candidate(0.0), lambda a, b: error(a) < error(b), tries=40, highest=3)
    assert (degree(found), found.reuse.beta) == (3.0, 0.25)


@given(least=st.floats(0.0, 1.0), start=st.sampled_from([0.0, 0.5, 1.0]), tries=st.integers(0, 8), highest=st.integers(2, 3))
def test_no_more_than_so_many(least: float, start: float, tries: int, highest: int) -> None:
    """What comes back is the best of what was measured, which is no more than asked for beside the start, and no higher."""
    seen = dict[Candidate, float]()

    def error(c: Candidate) -> float:
        seen[c] = abs(c.reuse.beta - least) + abs(degree(c) - 2.6)
        return seen[c]

    found = settled(candidate(start), lambda a, b: error(a) < error(b), tries=tries, highest=highest)
    assert len(seen.keys() - {candidate(start)}) <= tries and all(c.reuse.highest <= highest for c in seen)
    assert not seen or seen[found] == min(seen.values())


@pytest.mark.parametrize("other", [float("inf"), 1.0])
def test_nothing_better(other: float) -> None:
    """Where nothing else can be run, or none helps, it stays what it was."""
    errors = {candidate(0.0): 0.5}
    assert settled(candidate(0.0), lambda a, b: errors.get(a, other) < errors.get(b, other), tries=30, highest=3) == candidate(0.0)
