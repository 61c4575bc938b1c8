"""The schedule of least cost for each number of recomputes, by dynamic programming over (step, last recomputes)."""

from __future__ import annotations

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
        while True:
            ends = [
                (self._join(value, tail), nodes) for nodes, (value, _) in layer.items() if (tail := self._tail(nodes)) is not None
            ]
            if ends:
                found[len(layers)] = _trace(layers, min(ends)[1])
            if len(layers) >= min(most, self.n):
                return found
            layer = self._next(layer)
            layers.append(layer)

    def _forced(self, i: int) -> bool:
        return i < max(1, self.first) or i >= self.n - self.last

    def _join(self, a: Value, b: Value) -> Value:
        if self.objective == "max":
            return max(a[0], b[0]), a[1] + b[1]
        return a[0] + b[0], max(a[1], b[1])

    def _next(self, layer: _Layer) -> _Layer:
        """One more recompute behind each."""
        made: _Layer = {}
        for nodes, (value, _) in layer.items():
            between: Value = (0.0, 0.0)
            for i in range(nodes[0] + 1, min(self.n, nodes[0] + self.reach + 1)):
                reached = (i, *nodes)[: self.length]
                total = self._join(value, between)
                if reached not in made or total < made[reached][0]:
                    made[reached] = total, nodes
                if self._forced(i):
                    break
                step = self.cost(nodes, i)
                between = self._join(between, (step, step))
        return made

    def _tail(self, nodes: Nodes) -> Value | None:
        """What the steps behind the last recompute cost; None where one of them may not be reused."""
        rest = range(nodes[0] + 1, self.n)
        if len(rest) >= self.reach or any(map(self._forced, rest)):
            return None
        total: Value = (0.0, 0.0)
        for i in rest:
            step = self.cost(nodes, i)
            total = self._join(total, (step, step))
        return total


def _trace(layers: list[_Layer], nodes: Nodes) -> Nodes:
    found = [nodes[0]]
    for layer in reversed(layers):
        before = layer[nodes][1]
        if before is None:
            break
        nodes = before
        found.append(nodes[0])
    return tuple(reversed(found))
