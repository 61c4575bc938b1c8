"""Schedules that are worth running, best by prediction first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from cachekit.error_model import ErrorModel
from cachekit.policies.at_most import at_most
from cachekit.policies.first import first as first_steps
from cachekit.policies.last import tail
from cachekit.policies.moved import moved
from cachekit.reuse import Forecast
from cachekit.schedule import plan
from cachekit.schedule_paths import Objective, Paths

OBJECTIVES: tuple[Objective, ...] = ("sum", "max")
# Full steps at the start and at the end: none asked for, cachekit's own guards, and each of the two.
GUARDS = ((1, 0), (3, 0), (1, 2), (3, 2))


@dataclass(frozen=True)
class Candidate:
    """A way to sample: a site by its name in the calibration, what it reuses, and the steps that are recomputed, rising."""

    site: str
    reuse: Forecast
    recompute: tuple[int, ...]


def even(n: int, count: int, first: int, last: int) -> tuple[int, ...]:
    """So many of n steps as evenly as can be, with so many at either end; fewer of these where there are not enough."""
    first, last = min(first, count), max(0, min(last, count - first))
    inner, room = count - first - last, n - first - last
    places = (first + (k + 1) * room // (inner + 1) - (room // (inner + 1) > 0) for k in range(inner))
    return tuple(sorted({*range(first), *places, *range(n - last, n)}))


def periodic(timesteps: tuple[float, ...]) -> set[tuple[int, ...]]:
    """What policies of a fixed period recompute on this grid: each with warm-ups, with and without steps held back, and tails."""
    found = set[tuple[int, ...]]()
    for n, warm_up, strides, share in product(range(2, 9), (1, 2, 3), (0.0, 0.5, 1.0), (0.0, 0.06)):
        guard = at_most(n - 1) | tail(share) if share else at_most(n - 1)
        made = plan(first_steps(warm_up) | guard & moved(strides), timesteps)
        found.add(tuple(i for i, full in enumerate(made) if full))
    return found


def moves(recompute: tuple[int, ...], n: int, most: int) -> Iterator[tuple[int, ...]]:
    """Every schedule with one recompute moved by up to so many steps to where none is; the first step stays."""
    full = set(recompute)
    for i in recompute[1:]:
        for by in (*range(-most, 0), *range(1, most + 1)):
            if 0 < i + by < n and i + by not in full:
                yield tuple(sorted((full - {i}) | {i + by}))


def polished(model: ErrorModel, recompute: tuple[int, ...], rounds: int = 100) -> tuple[int, ...]:
    """A schedule from which no single move betters the prediction, or as near as so many moves bring it."""
    error = model.predict(recompute)
    for _ in range(rounds):
        found = min(((model.predict(moved), moved) for moved in moves(recompute, model.n, 4)), default=None)
        if found is None or found[0] >= error:
            break
        error, recompute = found
    return recompute


def reach_for(n: int, count: int) -> int:
    """How long a gap may get: four times an even schedule's, since grids may be dense where nothing happens."""
    return min(n, max(8, 4 * -(-n // count)))


def schedules(model: ErrorModel, count: int) -> set[tuple[int, ...]]:
    """Schedules of so many recomputes: of least sum and least maximum of the costs under each guard, even and periodic ones; and
    each of them polished.
    """
    found = set[tuple[int, ...]]()
    for first, last in GUARDS:
        for objective in OBJECTIVES:
            paths = Paths(model.n, model.cost, min(model.reuse.length, 3), objective, first, last, reach_for(model.n, count))
            found.add(paths.best(count).get(count, ()))
        found.add(even(model.n, count, first, last))
    found |= periodic(model.timesteps)
    right = {recompute for recompute in found if len(recompute) == count}
    return right | {polished(model, recompute) for recompute in right}


def ranked(site: str, models: Iterable[ErrorModel], count: int) -> list[tuple[float, Candidate]]:
    """Candidates of one site and number of recomputes with their predicted errors, best first."""
    found = [
        (model.predict(recompute), Candidate(site, model.reuse, recompute))
        for model in models
        for recompute in schedules(model, count)
    ]
    return sorted(found, key=lambda item: item[0])
