"""What stands between a wrapped model and its callers: opens each step, closes it, whatever happens."""

from __future__ import annotations

import threading
import warnings
import weakref
from asyncio import current_task
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cachekit.adapter import Adapter
from cachekit.blocks import find_blocks
from cachekit.call import GraphChanged, KnownCall, Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.errors import ModelError
from cachekit.inputs import Inputs, Reader
from cachekit.patch import Patch
from cachekit.segments import Site
from cachekit.session import Branch, Generation, Lane, Name, step_of
from cachekit.stats import Record, Stats
from cachekit.tree import tensors
from cachekit.watched import WatchedCall
from cachekit.whole import store_prediction, whole_prediction

NO_GRAD = "cachekit computes every step in full while gradients are recorded; sample under torch.no_grad() to reuse"


class _Local(threading.local):
    """The call that is under way in this thread (a model call never awaits, so that tasks need no call of their own)."""

    call: PlainCall | None = None


class Engine:
    """The state of one wrapped model. Tensors live in its lanes only; a copy of the model starts without any."""

    def __init__(self, model: nn.Module, sites: tuple[Site, ...], adapter: Adapter) -> None:
        self.model, self.sites, self.adapter = model, sites, adapter
        self.stats = Stats()
        self.patches: list[Patch] = []
        self.kinds: dict[str, str] = {}
        self.removed = False
        self.reader = Reader(model.forward, adapter)
        self._fresh()

    def _fresh(self) -> None:
        self._local = _Local()
        self._lock = threading.Lock()
        self._lanes: weakref.WeakKeyDictionary[Any, Lane] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_local", "_lock", "_lanes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    @property
    def lane(self) -> Lane:
        """The lane of the asyncio task, or else of the thread, that asks."""
        try:
            owner: Any = current_task() or threading.current_thread()
        except RuntimeError:
            owner = threading.current_thread()
        with self._lock:
            return self._lanes.setdefault(owner, Lane())

    def reset(self) -> None:
        """Forget every generation, in whatever lane."""
        with self._lock:
            for lane in self._lanes.values():
                lane.generation = None
        self.stats.hold(0)

    @contextmanager
    def named(self, name: Name) -> Iterator[None]:
        """Calls within belong to the branch of this name."""
        names = self.lane.names
        names.append(name)
        try:
            yield
        finally:
            names.pop()

    @contextmanager
    def within(self, generation: Generation) -> Iterator[None]:
        """Calls within belong to this generation, and nothing of it is left afterwards."""
        lane = self.lane
        outer, lane.generation = lane.generation, generation
        try:
            yield
        finally:
            lane.generation = outer
            self._count_bytes()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Calls within run as if the model were not wrapped."""
        lane = self.lane
        lane.disabled += 1
        try:
            yield
        finally:
            lane.disabled -= 1

    def attach(self) -> None:
        """Put interceptors on the model and its blocks, also on those that came since, or were compiled since."""
        patched = {(id(patch.module), patch.name) for patch in self.patches}
        targets: list[tuple[nn.Module, str, tuple[Any, ...]]] = [(self.model, "forward", (self,))]
        if callable(getattr(self.model, "cache_context", None)):
            targets.append((self.model, "cache_context", (self,)))
        for path, block in find_blocks(self.model, self.adapter).items():
            self.kinds[path] = type(block).__name__
            targets.append((block, "forward", (self, path)))
        for module, name, bound in list(targets):
            # A compiled module is entered here; its forward would be traced, and the decision with it.
            if name == "forward" and getattr(module, "_compiled_call_impl", None) is not None:
                targets.append((module, "_compiled_call_impl", bound))
        functions = {"cache_context": intercept_context}
        for module, name, bound in targets:
            if (id(module), name) not in patched:
                function = functions.get(name, intercept_block if len(bound) == 2 else intercept_model)
                self.patches.append(Patch(module, name, function, *bound))

    def detach(self) -> None:
        """Take the interceptors out again. One that lies under somebody else's hook stays, and does nothing."""
        self.removed = True
        self.patches = [patch for patch in reversed(self.patches) if not patch.remove()]
        self.reset()

    def lift(self) -> None:
        """Take the interceptors out for ``attach`` to put them back, and forget what is stored.

        Raises:
            ModelError: somebody else's hook lies on one of them; all are back in place then.
        """
        self.patches = [patch for patch in reversed(self.patches) if not patch.remove()]
        self.reset()
        if self.patches:
            path = next((path for path, module in self.model.named_modules() if module is self.patches[0].module), "")
            self.attach()
            raise ModelError(f"another library's hook lies on the cache at {path or 'the model'!r}; cachekit.unwrap(model) first")

    def block(self, path: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block is called."""
        call = self._local.call
        return original(*args, **kwargs) if call is None else call.visit(path, original, args, kwargs)

    def step(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model is called."""
        lane = self.lane
        if self.removed or lane.disabled or self._local.call is not None:
            return original(*args, **kwargs)
        inputs = self.reader.read(args, kwargs)
        self.stats.synchronisations += inputs.synchronised
        reason = self._not_cached(inputs, args, kwargs)
        if reason is not None:
            return self._plain(reason, lane, inputs, original, args, kwargs)
        waits = lane.comparer.waits
        placed = lane.place(inputs, self.adapter.range is not None)
        self.stats.synchronisations += lane.comparer.waits - waits
        if placed.doubt:
            self.stats.dropped[placed.doubt] += 1
        if placed.new_generation:
            self.stats.generations += 1
            self.stats.records = []
        try:
            return self._cached(lane, placed.branch, original, args, kwargs)
        except BaseException:
            lane.generation = self._emptied(lane.generation)
            self._count_bytes()
            raise

    @staticmethod
    def _emptied(generation: Generation | None) -> Generation | None:
        return Generation(generation.steps, True) if generation is not None and generation.explicit else None

    def _cached(self, lane: Lane, branch: Branch, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generation = lane.generation or Generation()
        if not branch.states:
            branch.states = [site.policy.init() for site in self.sites]
            self._note_needs(generation)
        step = step_of(branch, generation, self.adapter.range)
        decisions = Decisions(branch, self.sites, step, self._synchronised)
        try:
            call, result = self._run(decisions, original, args, kwargs)
        except GraphChanged as change:
            self.stats.dropped[str(change)] += 1
            branch.drop()
            decisions = Decisions(branch, self.sites, step, self._synchronised)
            call, result = self._run(decisions, original, args, kwargs)
        decisions.close()
        self.stats.count(Record(branch.i, branch.t, branch.name.text, call))
        self._count_bytes()
        return result

    def _run(
        self, decisions: Decisions, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[bool, ...], Any]:
        """Run one call under these decisions; returns which visits ran, and the result."""
        branch = decisions.branch
        whole = [k for k, site in enumerate(self.sites) if site.segment.is_model]
        if branch.graph is not None and whole and not decisions.recompute(whole[0]):
            return (False,) * len(branch.graph.visits), whole_prediction(decisions, whole[0])
        if branch.graph is None or branch.layout is None:
            self.attach()
            call: PlainCall = WatchedCall(decisions, self.adapter, self.kinds)
        else:
            call = KnownCall(branch.graph, branch.layout, decisions)
        sample = branch.inputs.sample
        entry = sample.detach().clone() if sample is not None and any(self.sites[k].reuse.beta for k in whole) else None
        result = self._under(call, original, args, kwargs)
        if isinstance(call, WatchedCall):
            call.close()
            if not call.recomputed and len(whole) < len(self.sites):
                self.stats.notes.add(
                    "no block was seen running: compile the blocks (block.compile()), not the whole model; or use segments='model'"
                )
        elif isinstance(call, KnownCall):
            call.finish()
        for k in whole:
            store_prediction(decisions, k, result, entry)
        return tuple(call.recomputed), result

    def _under(self, call: PlainCall, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._local.call = call
        try:
            return original(*args, **kwargs)
        finally:
            self._local.call = None

    def _plain(
        self, reason: str, lane: Lane, inputs: Inputs, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call in full, count it, and leave nothing that a later step could take for its predecessor's."""
        lane.generation = self._emptied(lane.generation)
        self._count_bytes()
        self.stats.uncached[reason] += 1
        call = PlainCall()
        result = self._under(call, original, args, kwargs)
        t = float("nan") if inputs.t is None else inputs.t
        self.stats.count(Record(0, t, lane.name.text, tuple(call.recomputed)))
        return result

    def _not_cached(self, inputs: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():
            asked = any(tensor.requires_grad for _, tensor in tensors((args, kwargs)))
            if self.model.training or asked or any(parameter.requires_grad for parameter in self.model.parameters()):
                if not self.model.training:
                    warnings.warn(NO_GRAD, stacklevel=5)
                return "gradients are recorded"
        return "mixed timesteps in one batch" if inputs.t is None else None

    def _note_needs(self, generation: Generation) -> None:
        known = {"steps": generation.steps is not None}
        known["end"] = known["steps"] or self.adapter.range is not None
        for need in {need for site in self.sites for need in site.policy.required() if not known.get(need, True)}:
            what = "the number of steps is not" if need == "steps" else "neither the number of steps nor the timesteps' range is"
            self.stats.notes.add(
                f"the guard of the last steps was off: {what} known; sample within model.cachekit.session(steps=...)"
            )

    def _synchronised(self) -> None:
        self.stats.synchronisations += 1

    def _count_bytes(self) -> None:
        with self._lock:
            generations = [lane.generation for lane in self._lanes.values() if lane.generation is not None]
        self.stats.hold(sum(branch.nbytes for generation in generations for branch in generation.branches))


def intercept_model(engine: Engine, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a wrapped model's forward."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    return engine.step(original, args, kwargs)


def intercept_block(engine: Engine, path: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a block's forward, or before its compiled code."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    return engine.block(path, original, args, kwargs)


@contextmanager
def intercept_context(engine: Engine, original: Original, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in the place of a model's ``cache_context(name)``, with which pipelines name the branch."""
    with engine.named(Name(name)), original(name, *args, **kwargs):
        yield
