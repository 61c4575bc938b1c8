"""One call of a wrapped model under its decisions: what runs, and what the first call of a branch finds out for later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachekit import refresh
from cachekit.alone import MeasuredCall
from cachekit.audit import WRITES
from cachekit.call import Given, GraphChanged, KnownCall, Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.guidance import PassDecisions, Run
from cachekit.guidance_batch import BatchedPasses
from cachekit.interceptors import WHOLE
from cachekit.sample_decisions import SampleDecisions
from cachekit.sub_batch import known_call, run_part
from cachekit.trial import Trial
from cachekit.watched import WatchedCall
from cachekit.whole import store_prediction, whole_prediction

if TYPE_CHECKING:
    from cachekit.engine import Engine

# Which visits, and which of their modules, ran.
Ran = tuple[tuple[bool, ...], tuple[bool, ...]]


@dataclass(frozen=True)
class Running:
    """Of one call; ``original`` is the model's own forward."""

    engine: Engine
    decisions: Decisions
    original: Original

    def run(self, given: Given) -> tuple[Ran, Any]:
        """What ran, and the result.

        Raises:
            GraphChanged: the model calls its blocks otherwise than when this branch was first seen.
        """
        decisions, branch, whole = self.decisions, self.decisions.branch, self.decisions.whole
        if isinstance(decisions, PassDecisions):
            call, result = decisions.run(Run(self._all, self._under), given)
            return (((False,) * len(branch.blocks or ()), ()) if call is None else self._ran(call)), result
        if branch.blocks is not None and whole and not decisions.recompute(whole[0]):
            return ((False,) * len(branch.blocks), ()), whole_prediction(decisions, whole[0])
        sample = branch.inputs.sample
        entry = sample.detach().clone() if sample is not None and any(decisions.sites[k].reuse.beta for k in whole) else None
        part = decisions.part(whole[0]) if branch.blocks is not None and whole else None
        call, result = self._all(given) if part is None else run_part(decisions, whole[0], part, self._under, given)
        ran = self._ran(call)
        # Where segments ask for a decision for each block, the watched call has found how many there are.
        for k in decisions.whole:
            store_prediction(decisions, k, result, entry)
        return ran, result

    def _under(self, call: PlainCall, given: Given) -> Any:
        return self.engine.under_way.run(call, given, self.original)

    def _ran(self, call: PlainCall) -> Ran:
        branch = self.decisions.branch
        if branch.blocks is not None and call.blocks != branch.blocks:
            raise GraphChanged("another sequence of blocks")
        branch.blocks = call.blocks
        return tuple(call.recomputed), tuple(call.modules)

    def _all(self, given: Given) -> tuple[PlainCall, Any]:
        """Run the model on the whole batch; segments of its blocks may be reused, or run for some samples."""
        engine, trial = self.engine, None
        if self.decisions.branch.blocks is None:
            engine.attach()
            trial = self._trial(given)
        call = self._call(trial)
        with engine.auditor.watching(engine.model, not isinstance(call, KnownCall)):
            result = self._under(call, given)
        if engine.auditor.writes:
            engine.note(WRITES)
        if isinstance(call, KnownCall):
            call.finish()
        elif isinstance(call, WatchedCall) and not engine.removed:
            self._close(call)
        if trial is not None and not engine.removed:
            self._try(trial, call, result)
        return call, result

    def _trial(self, given: Given) -> Trial | None:
        decisions, sites = self.decisions, self.engine.sites
        if isinstance(decisions, BatchedPasses):
            return None if decisions.sampled is None else Trial(decisions.sampled, sites, given, decisions.cond)
        return Trial(decisions.sampled, sites, given) if isinstance(decisions, SampleDecisions) else None

    def _call(self, trial: Trial | None) -> PlainCall:
        """What the blocks of a call go through."""
        engine, branch = self.engine, self.decisions.branch
        if branch.graph is not None and branch.layout is not None:
            return known_call(branch.graph, branch.layout, self.decisions)
        # The whole prediction asks nothing of the blocks.
        if all(site.segment.is_model for site in engine.sites):
            return PlainCall()
        given = self.decisions, engine.adapter, engine.interceptors
        return WatchedCall(*given) if trial is None else MeasuredCall(*given, part=trial.part)

    def _close(self, call: WatchedCall) -> None:
        """Note what the first call of a branch shows of the model."""
        call.close()
        engine, branch = self.engine, self.decisions.branch
        if not call.recomputed:
            engine.note(WHOLE)
        if branch.graph is not None and branch.layout is not None:
            engine.stats.notes.update(branch.layout.notes(branch.graph, branch.sites))
            engine.stats.notes.update(engine.interceptors.notes(branch.graph))
            engine.stats.notes.update(refresh.notes(branch.graph, branch.layout, branch.sites))

    def _try(self, trial: Trial, call: PlainCall, result: Any) -> None:
        """Find out how a part of the batch can be run."""
        reason = trial.run(self.decisions.branch, call, result, self._under)
        if reason is not None:
            self.engine.note(f"one decision for a whole batch: {reason}")
        with self.engine.lock:
            self.engine.stats.tried(len(trial.alone.recomputed), len(trial.alone.modules), trial.part.share, trial.waits)
