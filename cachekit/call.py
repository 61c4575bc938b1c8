"""One model call: each block's visit runs it, or returns in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cachekit import measured, module_store
from cachekit.decisions import Decisions
from cachekit.graph import Graph, Visit, has_signature, signature
from cachekit.inside import ATTENTION
from cachekit.layout import Action, Layout
from cachekit.module_store import Entering
from cachekit.tree import Path, arguments, get, pick, replaced, tensors
from cachekit.uncounted import Uncounted
from cachekit.values import Measures

Original = Callable[..., Any]
# Positional and keyword arguments.
Given = tuple[tuple[Any, ...], dict[str, Any]]


class GraphChanged(BaseException):
    """The call shows another graph than the one stored for. No model's ``except Exception`` may swallow it."""


class PlainCall:
    """A call that is only counted: everything runs."""

    def __init__(self) -> None:
        self.recomputed: list[bool] = []
        self.blocks: list[str] = []
        self.modules: list[bool] = []

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block."""
        self.recomputed.append(True)
        self.blocks.append(block)
        return original(*args, **kwargs)

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module of the block that is being visited."""
        self.modules.append(True)
        return original(*args, **kwargs)

    def show(self, values: Tensor) -> None:
        """The module that runs makes value vectors (batch, tokens, heads, width)."""


class KnownCall(PlainCall):
    """A call whose graph is known: segments are recomputed or reused, and what the call shows is checked against it."""

    def __init__(self, graph: Graph, layout: Layout, decisions: Decisions) -> None:
        super().__init__()
        self.graph, self.layout, self.decisions = graph, layout, decisions
        self._spans = {span for spans in layout.spans for span in spans.values()}
        self._first = next(iter(graph.blocks), None)
        self._opened: dict[tuple[int, Path], Tensor] = {}
        self._entering: dict[int, dict[Path, Tensor]] = {}
        self._returned: dict[Path, tuple[Tensor, int | None]] = {}
        self._uncounted = Uncounted()
        self._stretches = {action.run for action in layout.actions if action is not None}
        self._called = 0
        self.measures = Measures(site.reuse for site in decisions.sites)
        # Whether a block is running on a part of the batch. Its modules are no sites: it is one itself.
        self.in_part = False

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block, or return in its place.

        Raises:
            GraphChanged: another block, shape, dtype, device or link than the graph has here.
        """
        v = len(self.recomputed)
        if v >= len(self.graph.visits) or self.graph.visits[v].block != block:
            raise GraphChanged("another sequence of blocks")
        visit, action = self.graph.visits[v], self.layout.actions[v]
        self._check(visit, args, kwargs)
        if v == self._first and self.decisions.looks_at("modulated"):
            written = None if visit.writes else [path for path, _ in visit.streams]
            self.decisions.show_modulated(block, original, args, kwargs, written)
        runs = action is None or self.decisions.recompute(action.site)
        self._before(v, visit, action, runs, args, kwargs)
        if runs:
            self._called = 0
            result = self.run(v, block, original, args, kwargs)
            if self._called != len(visit.modules):
                raise GraphChanged("another sequence of modules")
            self._store(v, action, result)
        else:
            self.recomputed.append(False)
            self.blocks.append(block)
            result = self._instead(v, visit, action, args, kwargs) if action is not None else None
        for span in self._spans:
            if span.end == v and (runs or not span.computed):
                left = get(result, span.leaves).detach()
                self.decisions.shown[span] = left.clone() if span.enters is None else left - self._opened[span.start, span.enters]
        self._returned = {path: (tensor, _version(tensor)) for path, tensor in tensors(result)}
        if v + 1 in self._stretches:
            self._uncounted.leaves(result)
        return result

    def run(self, v: int, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block of visit v."""
        return super().visit(block, original, args, kwargs)

    def run_module(
        self, at: tuple[int, int], k: int, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any], entering: Entering
    ) -> Any:
        """Run a module of segment k: at which visit, and which of its calls."""
        return super().module(self.graph.visits[at[0]].modules[at[1]].name, original, args, kwargs)

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module of the block that is being visited, or return in its place.

        Raises:
            GraphChanged: another module, shape, dtype or device than the graph has here.
        """
        v, n = len(self.recomputed) - 1, self._called
        self._called += 1
        known = self.graph.visits[v].modules
        if n >= len(known) or known[n].name != name:
            raise GraphChanged("another sequence of modules")
        seen, k = known[n], self.layout.modules[v][n]
        if self.in_part:
            return super().module(name, original, args, kwargs)
        if tuple((path, signature(tensor)) for path, tensor in arguments(args, kwargs)) != seen.inputs:
            raise GraphChanged("another shape, dtype or device")
        self.measures.begin()
        if k is None:
            result = super().module(name, original, args, kwargs)
            self._measured(v, n)
            return result
        runs = self.decisions.recompute(k)
        entering = module_store.entering(self.decisions, k, seen, args, kwargs)
        if not runs:
            self.modules.append(False)
            return module_store.instead(self.decisions, k, (v, n), seen, args, kwargs, entering, original)
        result = self.run_module((v, n), k, original, args, kwargs, entering)
        if tuple((path, signature(tensor)) for path, tensor in tensors(result)) != seen.returned:
            raise GraphChanged("a module that returns something else")
        module_store.keep(self.decisions, k, (v, n), seen, result, entering)
        self._measured(v, n)
        return result

    def show(self, values: Tensor) -> None:
        """Measure them."""
        self.measures.show(values)

    def _measured(self, v: int, n: int) -> None:
        visit = self.graph.visits[v]
        if visit.modules[n].kind != ATTENTION:
            return
        if visit.modules[n].values != self.measures.shapes:
            raise GraphChanged("other value vectors in attention")
        measured.remember(self.decisions, visit, self.layout.modules[v], (v, n), self.measures.found)

    def finish(self) -> None:
        """Check that the call had all of the graph's visits.

        Raises:
            GraphChanged: it had fewer.
        """
        if len(self.recomputed) != len(self.graph.visits):
            raise GraphChanged("another sequence of blocks")
        self.decisions.waits += self._uncounted.waits
        self.decisions.branch.ready.update(k for k, recomputed in self.decisions.made.items() if recomputed)

    def _check(self, visit: Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for (path, _), expected in zip(visit.streams, visit.signatures, strict=True):
            if not has_signature(pick(args, kwargs, path), expected):
                raise GraphChanged("another shape, dtype or device")
        if visit.linked == "same":
            for path, output in visit.links:
                tensor, version = self._returned.get(output, (None, None))
                if pick(args, kwargs, path) is not tensor or (tensor is not None and _version(tensor) != version):
                    raise GraphChanged("another link between blocks")

    def _before(
        self, v: int, visit: Visit, action: Action | None, runs: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note what enters a stretch of a segment, and what a policy's probe counts from (as copies: blocks may write)."""
        if action is not None and action.run == v and self.decisions.sites[action.site].reuse.beta:
            entering = {path: pick(args, kwargs, path).detach() for path, _ in visit.streams}
            self._entering[v] = {path: tensor.clone() for path, tensor in entering.items()} if runs else entering
        for span in self._spans:
            if span.start == v and span.enters is not None and (runs or not span.computed):
                self._opened[v, span.enters] = pick(args, kwargs, span.enters).detach().clone()

    def _entry(self, action: Action, path: Path) -> Tensor | None:
        entering, at = self._entering.get(action.run), dict(action.entry).get(path)
        return entering[at] if entering is not None and at is not None else None

    def _store(self, v: int, action: Action | None, result: Any) -> None:
        if action is not None:
            for path in action.hold:
                self.decisions.keep(action.site, v, path, get(result, path), self._entry(action, path))

    def _instead(self, v: int, visit: Visit, action: Action, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._uncounted.unchanged(v, visit, action, args, kwargs):
            raise GraphChanged("another link between blocks")
        held = {path: self.decisions.forecast(action.site, v, path, self._entry(action, path)) for path in action.hold}
        # A model may go on with what it gave, and never look at what is returned.
        for path, given in visit.in_place:
            if path in held:
                held[path] = pick(args, kwargs, given).copy_(held[path])
        passed = {out: pick(args, kwargs, path) for path, out in (*visit.streams, *visit.passes) if out not in held}
        return replaced(visit.structure, {**passed, **held})


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
