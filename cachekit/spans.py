"""What a policy looks at of the blocks around its segment, and in the middle of it."""

from __future__ import annotations

from dataclasses import dataclass

from cachekit.graph import Graph
from cachekit.signals import Signal
from cachekit.tree import Path


@dataclass(frozen=True)
class Span:
    """Visits whose residual of the main stream a policy looks at: where it enters the first, and where it leaves the last.

    Where ``enters`` is None it looks at what leaves the last. ``computed`` is whether only what was computed counts, and not what
    was reused in its place.
    """

    start: int
    enters: Path | None
    end: int
    leaves: Path
    computed: bool = False


def spans(graph: Graph, members: set[int], touched: set[int], looks: frozenset[Signal]) -> dict[str, Span]:
    """What signals look at around and in a segment of these visits; those that may not always run in full are ``touched``."""
    found: dict[str, Span] = {}
    names = {signal.of for signal in looks}
    if not members:
        return found
    first = min(members)
    if first and graph.visits[first - 1].streams:
        enters, leaves = graph.visits[first - 1].streams[0]
        if "probe" in names:
            found["probe"] = Span(first - 1, enters, first - 1, leaves)
        if "front" in names:
            found["front"] = Span(*_back(graph, first - 1, enters), first - 1, leaves)
    behind = next((v for v in graph.blocks if v > max(members)), None)
    middle = sorted(members)[(len(members) - 1) // 2]
    if "middle" in names and graph.visits[middle].streams:
        enters, leaves = graph.visits[middle].streams[0]
        found["middle"] = Span(middle, enters, middle, leaves, computed=True)
    # One that is itself reused now and then would be compared with a forecast.
    if "check" in names and behind is not None and behind not in touched:
        found["check"] = Span(behind, None, behind, graph.visits[behind].streams[0][1])
    return found


def _back(graph: Graph, v: int, path: Path) -> tuple[int, Path]:
    """The first visit of a chain up to v, and where the stream that enters v at this path enters that one."""
    while graph.visits[v].linked == "same":
        output = dict(graph.visits[v].links).get(path)
        before = next((enters for enters, leaves in graph.visits[v - 1].streams if leaves == output), None)
        if before is None:
            break
        v, path = v - 1, before
    return v, path
