"""What segments come to on a model's graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cachekit.errors import ConfigError
from cachekit.graph import Graph
from cachekit.module_sites import module_sites
from cachekit.reuse import Reuse
from cachekit.segments import Segment, Site
from cachekit.spans import Span, spans
from cachekit.tree import Path


@dataclass(frozen=True)
class Action:
    """What a visit inside a segment does.

    Attributes:
        site: index of the segment.
        run: index of the visit where this stretch of a chain starts; its inputs are what a residual counts from.
        hold: output paths that are stored on a recompute and forecast on a reuse. Every other stream passes through.
        entry: for each held stream, the argument path in the visit ``run`` where it enters the stretch.
    """

    site: int
    run: int
    hold: tuple[Path, ...]
    entry: tuple[tuple[Path, Path], ...]


@dataclass(frozen=True)
class Layout:
    """The actions of a graph's visits.

    Attributes:
        actions: of each visit, None outside every segment.
        firsts: the visit at which each segment's decision falls; None for one that covers no block.
        spans: for each segment what its policy looks at of the blocks around it, by the signal's name (``Signal.of``).
        modules: of each visit, the segment that each of its modules' calls belongs to, or None.
    """

    actions: tuple[Action | None, ...]
    firsts: tuple[int | None, ...]
    spans: tuple[Mapping[str, Span], ...]
    modules: tuple[tuple[int | None, ...], ...]

    def notes(self, graph: Graph, sites: tuple[Site, ...]) -> set[str]:
        """A sentence for each segment that covers nothing of this graph."""
        return {
            f"segment ({site.segment.start}, {site.segment.stop}) covers none of this stack's {len(graph.blocks)} blocks"
            f"{f' with a module of kind {join(site.segment.names)}' if site.segment.names else ''}: all run"
            f"{_advised(site.segment)}"
            for site, first in zip(sites, self.firsts, strict=True)
            if first is None and not site.segment.is_model and graph.blocks
        }


def _advised(segment: Segment) -> str:
    return f"; {segment.advice}" if segment.advice else ""


def join(names: tuple[str, ...]) -> str:
    """Names in a sentence."""
    return " or ".join(names)


def expanded(sites: tuple[Site, ...], units: int) -> tuple[Site, ...]:
    """One site for each unit where a segment asks for a decision each (``each=True``)."""
    found: list[Site] = []
    for site in sites:
        covered = site.segment.units(units) if site.segment.each else range(0)
        found += [replace(site, segment=replace(site.segment, start=u, stop=u + 1, each=False)) for u in covered] or [site]
    return tuple(found)


def lay_out(graph: Graph, sites: tuple[Site, ...], unit: int) -> Layout:
    """What every visit of a graph does under these segments.

    Raises:
        ConfigError: two segments share a block, or a segment lies outside the stack.
    """
    blocks = graph.blocks
    units = [blocks[k : k + unit] for k in range(0, len(blocks), unit)]
    owner: dict[int, int] = {}
    for k, site in enumerate(sites):
        covered = site.segment.units(len(units))
        _check_range(site.segment, len(units))
        if site.segment.names:
            continue
        for v in (v for u in covered for v in units[u] if not graph.visits[v].writes):
            if v in owner:
                raise ConfigError(f"segments {sites[owner[v]].segment} and {site.segment} share block {graph.visits[v].block}")
            owner[v] = k
    actions: list[Action | None] = [None] * len(graph.visits)
    for k, site in enumerate(sites):
        for run in _runs(graph, [v for v in blocks if owner.get(v) == k], site.reuse):
            _lay_run(graph, owner, k, run, actions)
    modules = module_sites(graph, [site.segment for site in sites], units, owner)
    members: list[set[int]] = [{v for v, o in owner.items() if o == k} for k in range(len(sites))]
    for v, owners in enumerate(modules):
        for of in owners:
            if of is not None:
                members[of].add(v)
    firsts = tuple(min(found, default=None) for found in members)
    touched = set().union(*members)
    around = tuple(spans(graph, found, touched, site.signals) for found, site in zip(members, sites, strict=True))
    return Layout(tuple(actions), firsts, around, modules)


def _check_range(segment: Segment, units: int) -> None:
    ends = [end for end in (segment.start, segment.stop) if isinstance(end, int)]
    # "All but so many at each end" may well leave nothing of a short stack; that is noted, and everything runs.
    both_ends = len(ends) == 2 and ends[0] >= 0 > ends[1]
    if any(end > units or end < -units for end in ends) and not both_ends:
        raise ConfigError(
            f"segment ({segment.start}, {segment.stop}) lies outside this stack of {units} blocks"
            f"{_advised(segment) or '; give start and stop as in a Python slice of them'}"
        )


def _runs(graph: Graph, members: list[int], reuse: Reuse) -> list[list[int]]:
    # A residual needs the stretch's input and output in one layout, which only identity guarantees.
    joined = ("same",) if reuse.beta else ("same", "layout")
    runs: list[list[int]] = []
    for v in members:
        if runs and runs[-1][-1] == v - 1 and graph.visits[v].linked in joined:
            runs[-1].append(v)
        else:
            runs.append([v])
    return runs


def _lay_run(graph: Graph, owner: dict[int, int], site: int, run: list[int], actions: list[Action | None]) -> None:
    """Fill in the actions of one stretch: its end is held, and whatever a block outside it takes from within."""
    # What the same segment takes from itself it never needs on its own: it is recomputed or reused as one.
    taken = {
        (source.visit, source.output) for v, visit in enumerate(graph.visits) for source in visit.sources if owner.get(v) != site
    }
    entry: dict[Path, Path] = {}
    for v in run:
        visit = graph.visits[v]
        links = dict(visit.links) if v != run[0] else {}
        same = v == run[0] or visit.linked == "same"
        entry = {out: (entry[links[path]] if links else path) for path, out in visit.streams} if same else {}
        outs = [out for _, out in visit.streams]
        hold = [*visit.extras, *(out for out in outs if v == run[-1] or (v, out) in taken)]
        actions[v] = Action(site, run[0], tuple(hold), tuple((out, entry[out]) for out in hold if out in entry))
