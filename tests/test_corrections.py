"""The share of the input's change: against errors whose least is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachekit import Forecast
from cachekit.candidates import Candidate
from cachekit.corrections import corrected


def candidate(beta: float) -> Candidate:
    return Candidate("middle", Forecast(2, beta=beta, axis="grid"), (0, 3, 6))


@given(least=st.floats(-0.5, 1.5), start=st.sampled_from([0.0, 0.5, 1.0]), slope=st.floats(0.1, 10.0))
def test_the_least_of_a_valley(least: float, start: float, slope: float) -> None:
    """With tries enough it ends within the narrowest step of the least share that is allowed."""
    found = corrected(candidate(start), lambda c: slope * (c.reuse.beta - least) ** 2, tries=100)
    assert abs(found.reuse.beta - min(max(least, 0.0), 1.0)) <= 1 / 32
    assert found.recompute == (0, 3, 6) and found.site == "middle" and found.reuse.order == 2


@given(least=st.floats(0.0, 1.0), start=st.sampled_from([0.0, 0.5, 1.0]), tries=st.integers(0, 8))
def test_no_more_than_so_many(least: float, start: float, tries: int) -> None:
    """What comes back is the best of what was measured, which is no more than asked for beside the start."""
    seen: dict[float, float] = {}

    def error(c: Candidate) -> float:
        assert c.reuse.beta not in seen, "measured twice"
        seen[c.reuse.beta] = abs(c.reuse.beta - least)
        return seen[c.reuse.beta]

    found = corrected(candidate(start), error, tries)
    assert len(seen) <= tries + 1 and seen[found.reuse.beta] == min(seen.values())


@pytest.mark.parametrize("other", [float("inf"), 1.0])
def test_nothing_better(other: float) -> None:
    """Where no correction can be run, or none helps, it stays what it was."""
    assert corrected(candidate(0.0), lambda c: other if c.reuse.beta else 0.5) == candidate(0.0)
