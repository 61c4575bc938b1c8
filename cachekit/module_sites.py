"""Which segment each module of each block belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from cachekit.errors import ConfigError
from cachekit.graph import Graph
from cachekit.inside import covers


class OfModules(Protocol):
    """What is asked of a segment."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def units(self, units: int) -> range: ...


def module_sites(
    graph: Graph, segments: Sequence[OfModules], units: Sequence[tuple[int, ...]], owner: Mapping[int, int]
) -> tuple[tuple[int | None, ...], ...]:
    """The segment of each module's call in each visit, or None.

    Args:
        units: the visits of each unit that segments count.
        owner: the segment of each visit that is reused as a whole.

    Raises:
        ConfigError: a block, or a module, belongs to two segments.
    """
    found: list[list[int | None]] = [[None] * len(visit.modules) for visit in graph.visits]
    for k, segment in enumerate(segments):
        within = segment.units(len(units)) if segment.names else range(0)
        for v in (v for u in within for v in units[u]):
            if v in owner:
                raise ConfigError(
                    f"segments {segments[owner[v]]} and {segment} share block {graph.visits[v].block}: where it is reused its "
                    "modules are not called; give it to one of the two"
                )
            for n, module in enumerate(graph.visits[v].modules):
                if covers(segment.names, module.kind, module.temporal):
                    if (other := found[v][n]) is not None:
                        raise ConfigError(
                            f"segments {segments[other]} and {segment} share module {module.name} of block "
                            f"{graph.visits[v].block}; give them kinds or ranges that differ"
                        )
                    found[v][n] = k
    return tuple(map(tuple, found))
