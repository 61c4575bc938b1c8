"""What stands between a wrapped model and its callers: opens each step, closes it, whatever happens."""

from __future__ import annotations

import functools
import threading
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from cachekit.adapter import Adapter
from cachekit.again import Again
from cachekit.audit import Auditor, Shadow, ShadowCall, audit
from cachekit.branch import Branch, Name
from cachekit.call import GraphChanged, Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.errors import ModelError
from cachekit.guidance import HALVES
from cachekit.guidance_batch import BatchedPasses
from cachekit.guidance_calls import SeparatePasses
from cachekit.inputs import Inputs, Reader
from cachekit.interceptors import WHOLE, Interceptors
from cachekit.lane import Lane, Placed
from cachekit.lanes import Lanes
from cachekit.peek import Peeker
from cachekit.policy import Step
from cachekit.running import Running
from cachekit.sample_decisions import decisions_for
from cachekit.segments import Site
from cachekit.session import Generation, step_of
from cachekit.stats import Record, Stats
from cachekit.tree import tensors
from cachekit.under_way import UnderWay
from cachekit.values import measures

NO_GRAD = "cachekit computes every step in full while gradients are recorded; sample under torch.no_grad() to reuse"


class Engine:
    """The state of one wrapped model. Tensors live in its lanes only; a copy of the model starts without any."""

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[Site, ...],
        adapter: Adapter,
        audit_every: int | None = None,
        passes: int = 0,
        cond: str | None = None,
    ) -> None:
        self.model, self.sites, self.adapter = model, sites, adapter
        self.auditor = Auditor(audit_every)
        # Of guidance in one batch, where each sample is decided on by itself; 0 where one decision holds for the batch.
        self.passes = passes
        # Which pass of guidance is the conditional one, where the other one is a site.
        self.cond = cond
        self.stats = Stats()
        self.interceptors = Interceptors()
        self.removed = False
        self.reader = Reader(model.forward, adapter)
        self.looks_inside = any(signal.of == "modulated" for site in sites for signal in site.signals)
        self.measures = any(measures(site.reuse) for site in sites)
        self._fresh()

    def _fresh(self) -> None:
        self.under_way = UnderWay()
        # Over the statistics and the interceptors, which threads share.
        self.lock = threading.Lock()
        self.lanes = Lanes(self._hold)
        self.peeker = Peeker(functools.partial(self.interceptors.eager, self), self.note)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("under_way", "lock", "lanes", "peeker")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fresh()

    def _hold(self, nbytes: int) -> None:
        self.stats.hold(nbytes)

    def named(self, name: Name) -> AbstractContextManager[None]:
        """Calls within belong to the branch of this name."""
        return self.lanes.named(name)

    def attach(self) -> None:
        """Put interceptors wherever they belong and are not; none any more once the model is unwrapped."""
        with self.lock:
            if not self.removed:
                self.interceptors.attach(self, self.adapter, any(site.segment.names for site in self.sites))

    def detach(self) -> None:
        """Take the interceptors out again, while other threads may be in the middle of a call."""
        with self.lock:
            self.removed = True
            self.interceptors.detach()
        self.lanes.reset()

    def lift(self) -> None:
        """Take the interceptors out for ``attach`` to put them back, and forget what is stored.

        Raises:
            ModelError: somebody else's hook lies on one of them; all are back in place then.
        """
        with self.lock:
            self.interceptors.detach()
            stuck = [patch.module for patch in self.interceptors.patches]
        self.lanes.reset()
        if stuck:
            path = next((path for path, module in self.model.named_modules() if module is stuck[0]), "")
            self.attach()
            raise ModelError(f"another library's hook lies on the cache at {path or 'the model'!r}; cachekit.unwrap(model) first")

    def note(self, sentence: str) -> None:
        """Add a sentence to the statistics."""
        self.stats.notes.add(sentence)

    def traced(self) -> None:
        """The model is being compiled whole. Unless its compiled code is what a step runs, nothing will come by here."""
        if self.under_way.call is None:
            self.note(WHOLE)

    def step(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model is called."""
        lane = self.lanes.current
        if self.removed or lane.disabled or self.under_way.call is not None:
            if lane.disabled and lane.under_way and not self.removed and self.under_way.call is None:
                lane.pass_by(self.reader.time(args, kwargs))
            return original(*args, **kwargs)
        inputs = self.reader.read(args, kwargs)
        reason = self._not_cached(inputs, args, kwargs)
        if reason is not None:
            return self._plain(reason, lane, inputs, original, args, kwargs)
        waits = lane.comparer.waits
        placed = lane.place(inputs, self.adapter.range is not None)
        with self.lock:
            self.stats.begin(placed.new_generation, placed.doubt, inputs.synchronised + lane.comparer.waits - waits)
        try:
            return self._cached(lane, placed, original, args, kwargs)
        except BaseException:
            self.lanes.empty(lane)
            raise

    def _cached(self, lane: Lane, placed: Placed, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        branch, generation = placed.branch, lane.generation or Generation()
        if not branch.states:
            branch.states = [site.policy.init() for site in self.sites]
            self._note_needs(generation)
        step = step_of(branch, generation, self.adapter.range)
        shadow, auditing = self.auditor.shadow(self.model, branch, args, kwargs), self.auditor.on
        sites, audited = branch.sites or self.sites, shadow is not None
        decisions = self._decisions(lane, branch, sites, step, audited=audited, auditing=auditing)
        again = Again(args, kwargs, branch.kept)
        try:
            ran, result = Running(self, decisions, original).run((args, kwargs))
        except GraphChanged as change:
            with self.lock:
                self.stats.dropped[str(change)] += 1
            again.restore()
            branch.drop()
            decisions = self._decisions(lane, branch, self.sites, step, auditing=auditing)
            ran, result = Running(self, decisions, original).run((args, kwargs))
        decisions.show_prediction(result)
        decisions.close()
        decisions.waits += branch.settle(lane.comparer)
        shares = _shares(ran[0], decisions.shares), _shares(ran[1], decisions.module_shares)
        with self.lock:
            self.stats.count(Record(branch.i, branch.t, branch.name.text, *ran, *shares), decisions.waits)
        self.lanes.count_bytes(lane)
        if not all(decisions.made.values()):
            branch.reused += 1
            if shadow is not None:
                self._audit(shadow, decisions, original, result)
        return result

    def _decisions(self, lane: Lane, branch: Branch, sites: tuple[Site, ...], step: Step, **options: bool) -> Decisions:
        if not any(site.segment.is_pass for site in self.sites):
            return decisions_for(branch, sites, step, self.peeker, self.passes, self.note, **options)
        given = branch, sites, step, self.peeker
        if self.cond in HALVES:
            return BatchedPasses(*given, cond=self.cond, note=self.note, **options)
        generation = lane.generation or Generation()
        return SeparatePasses(*given, generation=generation, cond=self.cond, comparer=lane.comparer, note=self.note, **options)

    def _audit(self, shadow: Shadow, decisions: Decisions, original: Original, output: Any) -> None:
        """Run a reused step's full pass beside it. If that fails, the step is none the worse for it."""
        call, found = ShadowCall(decisions), None
        try:
            with shadow.untouched():
                full = self.under_way.run(call, (shadow.args, shadow.kwargs), original)
            found = audit(decisions, call, output, full)
        except Exception as error:
            self.note(f"an audit failed: {type(error).__name__}: {error}")
        with self.lock:
            self.stats.audit(found, len(call.recomputed))

    def _plain(
        self, reason: str, lane: Lane, inputs: Inputs, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call in full, count it, and leave nothing that a later step could take for its predecessor's."""
        self.lanes.empty(lane, missed=1)
        call = PlainCall()
        result = self.under_way.run(call, (args, kwargs), original)
        t = float("nan") if inputs.t is None else inputs.t
        with self.lock:
            self.stats.uncached[reason] += 1
            self.stats.count(Record(0, t, lane.name.text, tuple(call.recomputed), tuple(call.modules)), inputs.synchronised)
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
        known: dict[object, bool] = {"steps": generation.steps is not None}
        known["end"] = known["steps"] or self.adapter.range is not None
        for need in {need for site in self.sites for need in site.policy.required() if not known.get(need, True)}:
            what = "the number of steps is not" if need == "steps" else "neither the number of steps nor the timesteps' range is"
            self.note(f"a policy that counts from the end was off: {what} known; sample within model.cachekit.session(steps=...)")


def _shares(ran: tuple[bool, ...], shares: dict[int, float]) -> tuple[float, ...]:
    return tuple(shares.get(n, float(run)) for n, run in enumerate(ran)) if shares else ()
