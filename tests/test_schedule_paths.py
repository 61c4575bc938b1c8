"""Schedules by dynamic programming against all schedules there are."""

from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from cachekit.candidates import even, moves
from cachekit.schedule_paths import Cost, Nodes, Objective, Paths


def value(recompute: Nodes, n: int, cost: Cost, length: int, objective: Objective) -> float:
    """A schedule's sum or largest of the costs, step by step."""
    costs, last = [0.0], tuple[int, ...]()
    for i in range(n):
        if i in recompute:
            last = (i, *last)[:length]
        else:
            costs.append(cost(last, i))
    return sum(costs) if objective == "sum" else max(costs)


def allowed(recompute: Nodes, paths: Paths) -> bool:
    ends = {*range(max(1, paths.first)), *range(paths.n - paths.last, paths.n)}
    gaps = [b - a for a, b in zip(recompute, (*recompute[1:], paths.n), strict=True)]
    return ends <= {*recompute} and max(gaps) <= paths.reach


@given(
    n=st.integers(2, 9),
    length=st.integers(1, 3),
    objective=st.sampled_from(["sum", "max"]),
    first=st.integers(1, 3),
    last=st.integers(0, 2),
    reach=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_the_best_of_all(n: int, length: int, objective: Objective, first: int, last: int, reach: int, seed: int) -> None:
    """For every number of recomputes that is possible; costs depend on the last recomputes and the step, at random."""

    def cost(nodes: Nodes, i: int) -> float:
        return float(hash((nodes, i, seed)) % 1000)

    paths = Paths(n, cost, length, objective, min(first, n), min(last, n), reach)
    found = paths.best(n)
    every = [(0, *rest) for count in range(n) for rest in combinations(range(1, n), count)]
    for count in range(1, n + 1):
        rivals = [recompute for recompute in every if len(recompute) == count and allowed(recompute, paths)]
        assert (count in found) == bool(rivals)
        if rivals:
            assert len(found[count]) == count and allowed(found[count], paths)
            best = min(value(recompute, n, cost, length, objective) for recompute in rivals)
            assert value(found[count], n, cost, length, objective) == best


@given(n=st.integers(1, 60), data=st.data(), first=st.integers(1, 3), last=st.integers(0, 2))
def test_an_even_schedule(n: int, data: st.DataObject, first: int, last: int) -> None:
    """It has as many steps as asked for, begins with the first, and its inner gaps differ by one at most."""
    count = data.draw(st.integers(1, n))
    made = even(n, count, first, last)
    assert made[0] == 0 and len(made) == count and list(made) == sorted({*made}) and made[-1] < n
    inner = [i for i in made if min(first, count) - 1 <= i < n - last]
    gaps = [b - a for a, b in pairwise(inner)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.sets(st.integers(1, 11), max_size=6))
def test_moves(rest: set[int]) -> None:
    """Each moves one recompute by at most three steps, none the first; all of them are there, once."""
    recompute = (0, *sorted(rest))
    found = list(moves(recompute, 12, 3))
    wanted = {tuple(sorted({*recompute} - {i} | {j})) for i in rest for j in range(1, 12) if j not in rest and abs(i - j) <= 3}
    assert {*found} == wanted and all(len(made) == len(recompute) for made in found)
