"""The first call of a branch: full, watched, and stored from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cachekit.adapter import Adapter
from cachekit.call import Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.policy import NO_PROBE, PROBES
from cachekit.segments import lay_out
from cachekit.tree import Path, arguments, pick, tensors
from cachekit.watch import Watch


class WatchedCall(PlainCall):
    """A full call that finds the graph, and stores what the next call may reuse.

    Where the segments end is known only when the call is over. Until then, whatever can turn out to be an end is kept: the
    last few outputs, those after which a chain broke, and those that a later block takes in.
    """

    def __init__(self, decisions: Decisions, adapter: Adapter, kinds: dict[str, str]) -> None:
        super().__init__()
        self.decisions, self.adapter, self.kinds = decisions, adapter, kinds
        self.watch = Watch(adapter)
        self._outputs: dict[int, dict[Path, Tensor]] = {}
        self._inputs: dict[int, dict[Path, Tensor]] = {}
        self._kept: set[int] = set()
        needs = frozenset[str]().union(*(site.policy.required() for site in decisions.sites))
        # Whatever counts from where a chain starts needs what entered there.
        self._entering = "front" in needs or any(site.reuse.beta for site in decisions.sites)
        segments = [site.segment for site in decisions.sites if not site.segment.is_model]
        starts = [segment.start * adapter.unit for segment in segments if isinstance(segment.start, int)]
        # A start counted from the back is a guess: that the model calls each of its blocks once.
        self._starts = {start if start >= 0 else len(kinds) + start for start in starts}
        self._ends = {segment.stop * adapter.unit - 1 for segment in segments if segment.stop}
        self._probed = {start - 1 for start in self._starts} if needs & PROBES else set()
        # An end counted from the back is among this many last outputs.
        self._window = (1 - min([0, *(end + 1 for end in self._ends)])) + adapter.unit

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block and note what it takes and returns."""
        v = len(self.recomputed)
        self.watch.before(block, self.kinds[block], args, kwargs)
        for path, (source, output) in self.watch.seen[v].origins.items():
            if source < v - 1:
                self._kept.add(source)
                if output not in self._outputs.setdefault(source, {}):
                    self._outputs[source][output] = pick(args, kwargs, path).detach().clone()
        if self._entering or v in self._probed:
            self._inputs[v] = {path: tensor.detach().clone() for path, tensor in arguments(args, kwargs)}
        result = super().visit(block, original, args, kwargs)
        if self.watch.after(result) != "same":
            self._kept.add(v - 1)
        elif v not in self._starts and v not in self._probed:
            self._inputs.pop(v, None)
        self._outputs[v] = {path: tensor.detach().clone() for path, tensor in tensors(result)}
        self._forget(v - self._window)
        return result

    def _forget(self, v: int) -> None:
        if v in self._outputs and v not in self._kept | self._ends | self._probed and not self.watch.has_extras(v):
            del self._outputs[v]

    def close(self) -> None:
        """Store what the segments hold. One whose values were not kept is computed again in the next call."""
        branch, sites = self.decisions.branch, self.decisions.sites
        branch.graph = graph = self.watch.graph()
        branch.layout = layout = lay_out(graph, sites, self.adapter.unit)
        lacking = set()
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
        for span in (span for spans in layout.spans for span in spans.values()):
            left, entered = self._outputs.get(span.end, {}).get(span.leaves), self._inputs.get(span.start, {}).get(span.enters)
            if left is not None and entered is not None:
                self.decisions.residuals[span] = left - entered
        covered = {action.site for action in layout.actions if action is not None}
        for k in covered:
            if PROBES & sites[k].policy.required() and not layout.firsts[k]:
                raise ConfigError(NO_PROBE)
        branch.ready |= covered - lacking
        for k in covered:
            self.decisions.made[k] = True
