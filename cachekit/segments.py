"""Where to reuse: segments as users write them, and what they come to on a model's graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from cachekit.errors import ConfigError
from cachekit.graph import Graph
from cachekit.inside import KINDS, MODULES
from cachekit.module_sites import module_sites
from cachekit.policy import Policy
from cachekit.reuse import Reuse
from cachekit.signals import Signal, signals
from cachekit.tree import Path

MODEL = "model"
UNCOND = "uncond"


@dataclass(frozen=True)
class Segment:
    """A contiguous range of blocks that shares one decision.

    Args:
        start, stop: block indices as in a Python slice: negative ones count from the end, None is the end itself.
            Where an adapter groups blocks into units, they count units. ``start="model"`` is the whole prediction,
            ``start="uncond"`` that of the unconditional pass of guidance alone.
        policy: for this segment alone; None takes ``wrap``'s.
        reuse: for this segment alone; None takes ``wrap``'s.
        modules: in place of the blocks, their modules of these kinds, which share the decision: ``"attn"``, ``"cross_attn"``,
            ``"mlp"``, ``"spatial_attn"``, ``"temporal_attn"``, or a tuple of them. The blocks themselves run on every step.
        each: a decision for every block (or unit) on its own, in place of one for all.
        advice: what to write instead where a stack is too short for it, for the message that says so.
    """

    start: int | str | None = None
    stop: int | None = None
    policy: Any = None
    reuse: Any = None
    modules: str | tuple[str, ...] | None = None
    each: bool = False
    advice: str = field(default="", repr=False, compare=False)

    @property
    def is_model(self) -> bool:
        """Whether the site is the whole prediction, of both passes of guidance or of the unconditional one."""
        return self.start in (MODEL, UNCOND)

    @property
    def is_pass(self) -> bool:
        """Whether it is that of the unconditional pass alone."""
        return self.start == UNCOND

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds of modules that it covers; none where it covers blocks."""
        return (self.modules,) if isinstance(self.modules, str) else tuple(self.modules or ())

    def units(self, units: int) -> range:
        """The units that it covers, of so many."""
        if isinstance(self.start, str):
            return range(0)
        return range(units)[slice(self.start, self.stop)]


WRITTEN: Mapping[str, Segment] = MappingProxyType(
    {
        "all": Segment(),
        "stack": Segment(),
        "blocks": Segment(each=True),
        "modules": Segment(modules=KINDS),
        MODEL: Segment(MODEL),
        UNCOND: Segment(UNCOND),
        **{name: Segment(modules=name) for name in MODULES},
    }
)


def parse_segments(segments: Any) -> tuple[Segment, ...]:
    """``None``/``"middle"``, ``"all"``/``"stack"``, ``"skip-K"``, ``"blocks"``, ``"modules"``, a kind of module, ``"model"``,
    ``"uncond"``, (start, stop), a ``Segment``, or a list of these.

    Raises:
        ConfigError: anything else, or a range that no stack can have blocks in.
    """
    if segments is None or segments == "middle":
        return (Segment(1, -1),)
    if isinstance(segments, str) and segments in WRITTEN:
        return (WRITTEN[segments],)
    if isinstance(segments, str) and (match := re.fullmatch(r"skip-(\d+)", segments)):
        k = int(match[1])
        return (Segment(k, -k if k else None),)
    if isinstance(segments, Segment):
        return (_checked(segments),)
    if isinstance(segments, range | slice):
        if segments.step not in (None, 1):
            raise ConfigError(f"segments={segments!r}: a segment is contiguous; leave the step out, or give several segments")
        return (_checked(Segment(segments.start, segments.stop)),)
    if _is_pair(segments):
        return (_checked(Segment(*segments)),)
    if isinstance(segments, list | tuple) and segments and not any(isinstance(item, int | float) for item in segments):
        return tuple(found for item in segments for found in parse_segments(item))
    raise ConfigError(
        f"unknown segments={segments!r}; write 'middle', 'all', 'skip-K', 'model', 'uncond', 'blocks', 'modules', 'attn', "
        "'cross_attn', 'mlp', (start, stop), or a list of these and of cachekit.Segment(start, stop, policy=..., reuse=..., "
        "modules=...)"
    )


def _is_end(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_end(item) for item in value)


def _checked(segment: Segment) -> Segment:
    if segment.is_model and segment.stop is None and not segment.names and not segment.each:
        return segment
    if segment.modules is not None and not (segment.names and all(name in MODULES for name in segment.names)):
        raise ConfigError(f"modules={segment.modules!r}; write one of {', '.join(map(repr, MODULES))}, or a tuple of them")
    start, stop = segment.start, segment.stop
    if not _is_end(start) or not _is_end(stop):
        raise ConfigError(
            f"Segment({start!r}, {stop!r}): start and stop are block numbers or None, or start alone is 'model' or 'uncond'; "
            "'middle', 'all' and 'skip-K' go into segments= as they are"
        )
    if isinstance(start, int) and isinstance(stop, int) and (start < 0) == (stop < 0) and start >= stop:
        raise ConfigError(f"segment ({start}, {stop}) covers no block; stop is the first block behind it, as in a Python slice")
    return segment


@dataclass(frozen=True)
class Site:
    """A segment with all that it needs: what wrap() makes of its arguments."""

    segment: Segment
    policy: Policy[Any]
    reuse: Reuse

    @cached_property
    def signals(self) -> frozenset[Signal]:
        """What the policy looks at."""
        return signals(self.policy.required())


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
class Span:
    """Visits whose residual of the main stream a policy looks at: where it enters the first, and where it leaves the last.

    Where ``enters`` is None it looks at what leaves the last.
    """

    start: int
    enters: Path | None
    end: int
    leaves: Path


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
        for v in (v for u in covered for v in units[u]):
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
    spans = tuple(_spans(graph, found, touched, site.signals) for found, site in zip(members, sites, strict=True))
    return Layout(tuple(actions), firsts, spans, modules)


def _spans(graph: Graph, members: set[int], touched: set[int], looks: frozenset[Signal]) -> dict[str, Span]:
    """What signals look at around a segment of these visits; ``touched`` are those that may not run in full on every step."""
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
