"""The first call of a branch: full, watched, and stored from."""

from __future__ import annotations

from typing import Any, Protocol, get_args

from torch import Tensor

from cachekit import measured, module_store
from cachekit.adapter import Adapter
from cachekit.call import Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import Graph, ModuleVisit
from cachekit.inside import Role, covers
from cachekit.layout import Layout, expanded, lay_out
from cachekit.module_watch import ModuleWatch
from cachekit.refresh import refreshes, takes_tokens
from cachekit.segments import Segment
from cachekit.signals import BLOCKS, LACKING, PROBES, Of
from cachekit.tree import Path, arguments, pick, replaced, tensors
from cachekit.values import Measured, Measures
from cachekit.watch import Watch


class Found(Protocol):
    """What is intercepted: the class name of each block, and the role of each of its modules."""

    kinds: dict[str, str]
    roles: dict[tuple[str, str], Role]


class WatchedCall(PlainCall):
    """A full call that finds the graph, and stores what the next call may reuse.

    Where the segments end is known only when the call is over. Until then, whatever can turn out to be an end is kept: the
    last few outputs, those after which a chain broke, and those that a later block takes in.
    """

    def __init__(self, decisions: Decisions, adapter: Adapter, interceptors: Found) -> None:
        super().__init__()
        self.decisions, self.adapter, self.found = decisions, adapter, interceptors
        kinds = interceptors.kinds
        self.module_watch = ModuleWatch()
        self._modules: dict[tuple[int, int], tuple[Any, dict[Path, Tensor]]] = {}
        self._block = ""
        self.watch = Watch(adapter)
        self._outputs: dict[int, dict[Path, Tensor]] = {}
        self._inputs: dict[int, dict[Path, Tensor]] = {}
        self._kept: set[int] = set()
        looks = {of for of in get_args(Of) if decisions.looks_at(of)}
        # Whatever counts from where a chain starts needs what entered there.
        self._entering = "front" in looks or any(site.reuse.beta for site in decisions.sites)
        self.measures = Measures(site.reuse for site in decisions.sites)
        self._measured: dict[tuple[int, int], list[Measured]] = {}
        self._tokens = any(refreshes(site.reuse) for site in decisions.sites)
        self._modules_enter = any(site.reuse.beta and site.segment.names for site in decisions.sites)
        segments = [site.segment for site in decisions.sites if not site.segment.is_model]
        # Where every block has a decision of its own, every one is an end.
        self._each = any(segment.each and not segment.names for segment in segments)
        starts = [segment.start * adapter.unit for segment in segments if isinstance(segment.start, int)]
        # A start counted from the back is a guess: that the model calls each of its blocks once.
        self._starts = {start if start >= 0 else len(kinds) + start for start in starts}
        self._ends = {segment.stop * adapter.unit - 1 for segment in segments if segment.stop}
        self._probed = {start - 1 for start in self._starts} if looks & PROBES else set()
        if "middle" in looks:
            # The same guess. Where it is wrong, there is nothing to compare with at the second recompute.
            covered = [segment.visits(len(kinds), adapter.unit) for segment in segments]
            self._probed |= {visits[(len(visits) - 1) // 2] for visits in covered if visits}
        # The block behind a segment's end; one counted from the back is among the last outputs.
        self._checked = {end + 1 for end in self._ends if end >= 0} if "check" in looks else set()
        self._modulated = "modulated" in looks
        # An end counted from the back is among this many last outputs.
        self._window = (1 - min([0, *(end + 1 for end in self._ends)])) + adapter.unit

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block and note what it takes and returns."""
        v = len(self.recomputed)
        self._block = block
        self.watch.before(block, self.found.kinds[block], args, kwargs)
        for path, (source, output) in self.watch.seen[v].origins.items():
            if source < v - 1:
                self._kept.add(source)
                if output not in self._outputs.setdefault(source, {}):
                    self._outputs[source][output] = pick(args, kwargs, path).detach().clone()
        if self._entering or v in self._probed:
            self._inputs[v] = {path: tensor.detach().clone() for path, tensor in arguments(args, kwargs)}
        if self._modulated:
            self.decisions.show_modulated(block, original, args, kwargs)
        result = super().visit(block, original, args, kwargs)
        self.watch.after(result)
        if self.watch.ends_before(v):
            self._kept.add(v - 1)
        elif v not in self._starts and v not in self._probed and not self._each:
            self._inputs.pop(v, None)
        # The first of those that are blocks, which is known now.
        self._modulated = self._modulated and not self.watch.has_streams(v)
        self._outputs[v] = {path: tensor.detach().clone() for path, tensor in tensors(result)}
        self._forget(v - self._window)
        return result

    def _forget(self, v: int) -> None:
        if (
            v in self._outputs
            and not self._each
            and v not in self._kept | self._ends | self._probed | self._checked
            and not self.watch.has_extras(v)
        ):
            del self._outputs[v]

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module and note what it takes and returns."""
        v = len(self.recomputed) - 1
        self.modules.append(True)
        enters = {path: tensor.detach().clone() for path, tensor in arguments(args, kwargs)} if self._modules_enter else {}
        role = self.found.roles[self._block, name]
        self.measures.begin()
        result, seen = self.module_watch.call(v, name, role, original, args, kwargs, self._tokens, self.measures)
        self._measured[v, len(self.module_watch.seen[v]) - 1] = self.measures.found
        if self._tokens and takes_tokens(seen):
            self.decisions.waits += seen.returned[0][1][2].type != "cpu"
        if any(self._may_cover(site.segment, v, seen) for site in self.decisions.sites):
            copies = {path: tensor.detach().clone() for path, tensor in tensors(result)}
            entering = {out: enters[path] for out, path in seen.entry if path in enters}
            self._modules[v, len(self.module_watch.seen[v]) - 1] = replaced(result, copies), entering
        return result

    def show(self, values: Tensor) -> None:
        """Measure them."""
        self.measures.show(values)

    def _may_cover(self, segment: Segment, v: int, seen: ModuleVisit) -> bool:
        """Whether a segment may turn out to cover a module. Where an end counts from the back, that is not known yet."""
        u = v // self.adapter.unit
        before = isinstance(segment.start, int) and 0 <= u < segment.start
        behind = segment.stop is not None and 0 <= segment.stop <= u
        return not before and not behind and covers(segment.names, seen.kind, seen.temporal)

    def close(self) -> None:
        """Store what the segments hold. One whose values were not kept is computed again in the next call."""
        branch, decisions = self.decisions.branch, self.decisions
        branch.graph = graph = self.module_watch.onto(self.watch.graph())
        branch.sites = decisions.sites = sites = expanded(decisions.sites, -(-len(graph.blocks) // self.adapter.unit))
        if len(branch.states) != len(sites):
            branch.states = [site.policy.init() for site in sites]
        branch.layout = layout = lay_out(graph, sites, self.adapter.unit)
        lacking = self._keep_blocks(layout) | self._keep_modules(graph, layout)
        for visit, owners in zip(graph.visits, layout.modules, strict=True):
            measured.check_sources(decisions, visit, owners)
        for at, found in self._measured.items():
            measured.remember(decisions, graph.visits[at[0]], layout.modules[at[0]], at, found)
        for span in (span for spans in layout.spans for span in spans.values()):
            left = self._outputs.get(span.end, {}).get(span.leaves)
            entered = None if span.enters is None else self._inputs.get(span.start, {}).get(span.enters)
            if left is not None and (entered is not None or span.enters is None):
                decisions.shown[span] = left if entered is None else left - entered
        covered = {k for k, first in enumerate(layout.firsts) if first is not None}
        for k in covered:
            for of in sorted({signal.of for signal in sites[k].signals} & BLOCKS):
                if of not in layout.spans[k]:
                    raise ConfigError(LACKING[of])
        branch.ready |= covered - lacking
        for k in covered:
            decisions.made[k] = True

    def _keep_modules(self, graph: Graph, layout: Layout) -> set[int]:
        """Store what modules returned; returns the segments that lack something."""
        lacking = set()
        for v, owners in enumerate(layout.modules):
            for n, k in enumerate(owners):
                if k is None:
                    continue
                seen = graph.visits[v].modules[n]
                module_store.check_entries(self.decisions, k, seen)
                if (v, n) not in self._modules:
                    lacking.add(k)
                    continue
                # Kept as it is let go, so that no more than one is held twice.
                result, entering = self._modules.pop((v, n))
                module_store.keep(self.decisions, k, (v, n), seen, result, entering)
        return lacking

    def _keep_blocks(self, layout: Layout) -> set[int]:
        """Store what leaves the segments; returns those that lack something."""
        sites, lacking = self.decisions.sites, set()
        for v, action in enumerate(layout.actions):
            if action is None:
                continue
            for path in action.hold:
                value = self._outputs.get(v, {}).get(path)
                at = dict(action.entry).get(path) if sites[action.site].reuse.beta else None
                entry = self._inputs.get(action.run, {}).get(at) if at is not None else None
                if value is None or (at is not None and entry is None):
                    lacking.add(action.site)
                else:
                    self.decisions.keep(action.site, v, path, value, entry)
        return lacking
