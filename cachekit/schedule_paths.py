"""The schedule of least cost for each number of recomputes, by dynamic programming over (step, last recomputes)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Objective = Literal["sum", "max"]
# Indices of the last recomputes, newest first.
Nodes = tuple[int, ...]
# (largest, total) or (total, largest): what comes first is minimised, the other settles what is equal.
Value = tuple[float, float]
Cost = Callable[[Nodes, int], float]
_Layer = dict[Nodes, tuple[Value, Nodes | None]]
_Ahead = tuple[list[tuple[Nodes, Value]], Value | None]


@dataclass(frozen=True)
class Paths:
    """What schedules are made of.

    Args:
        n: number of steps.
        cost: (last recomputes, step) -> what reuse at that step costs.
        length: how many of the last recomputes that depends on.
        objective: the sum of the costs, or the largest (minimax; LeMiCa, arXiv 2511.00090, finds it the better one).
        first, last: so many steps at either end are recomputed in any case; the first step always is.
        reach: most steps from one recompute to the next, or to the end.
    """

    n: int
    cost: Cost
    length: int
    objective: Objective = "sum"
    first: int = 1
    last: int = 0
    reach: int = 16

    def best(self, most: int) -> dict[int, Nodes]:
        """For each number of recomputes up to ``most`` that is possible, the steps of the best schedule, rising."""
        layer: _Layer = {(0,): ((0.0, 0.0), None)}
        layers, found = [layer], dict[int, Nodes]()
        # What lies ahead of the same recomputes is the same, however many there were before.
        ahead = functools.cache(self._ahead)
        while True:
            tails = {nodes: tail for nodes in layer if (tail := ahead(nodes)[1]) is not None}
            if tails:
                ends = [(self._join(layer[nodes][0], tail), nodes) for nodes, tail in tails.items()]
                found[len(layers)] = _trace(layers, min(ends)[1])
            if len(layers) >= min(most, self.n):
                return found
            layer = self._next(layer, ahead)
            layers.append(layer)

    def _forced(self, i: int) -> bool:
        return i < max(1, self.first) or i >= self.n - self.last

    def _join(self, a: Value, b: Value) -> Value:
        if self.objective == "max":
            return max(a[0], b[0]), a[1] + b[1]
        return a[0] + b[0], max(a[1], b[1])

    def _next(self, layer: _Layer, ahead: Callable[[Nodes], _Ahead]) -> _Layer:
        """One more recompute behind each."""
        made: _Layer = {}
        for nodes, (value, _) in layer.items():
            for reached, between in ahead(nodes)[0]:
                total = self._join(value, between)
                if reached not in made or total < made[reached][0]:
                    made[reached] = total, nodes
        return made

    def _ahead(self, nodes: Nodes) -> _Ahead:
        """The last recomputes after each that may follow, with what the steps until then cost; and what all the rest would cost,
        None where one of them may not be reused.
        """
        follow, cost = list[tuple[Nodes, Value]](), (0.0, 0.0)
        for i in range(nodes[0] + 1, min(self.n, nodes[0] + self.reach + 1)):
            follow.append(((i, *nodes)[: self.length], cost))
            if self._forced(i):
                return follow, None
            step = self.cost(nodes, i)
            cost = self._join(cost, (step, step))
        return follow, cost if self.n - nodes[0] <= self.reach else None


def _trace(layers: list[_Layer], nodes: Nodes) -> Nodes:
    found = [nodes[0]]
    for layer in reversed(layers):
        before = layer[nodes][1]
        if before is None:
            break
        nodes = before
        found.append(nodes[0])
    return tuple(reversed(found))
