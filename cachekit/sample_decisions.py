"""The decisions of one model call, where each sample of the batch is decided on by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cachekit.branch import Branch
from cachekit.decisions import Decisions
from cachekit.peek import Peeker
from cachekit.policy import Step
from cachekit.sample_history import SampleHistory
from cachekit.sampled import Sampled
from cachekit.samples import Part, Samples
from cachekit.segments import Site
from cachekit.signals import Signal
from cachekit.tree import Path
from cachekit.verdict import decided


class SampleDecisions(Decisions):
    """Asks each policy once for each sample, with that sample's own signals and state.

    Where it can't be known how to run a part of the batch, all samples are recomputed as soon as one is.
    """

    def __init__(self, branch: Branch, sampled: Sampled, sites: tuple[Site, ...], step: Step, peeker: Peeker) -> None:
        super().__init__(branch, sites, step, peeker, sampled.samples)
        self.sampled = sampled
        if not sampled.states:
            sampled.fit([site.policy for site in sites])
        self._chosen: dict[int, tuple[int, ...]] = {}
        self._parts: dict[tuple[int, ...], Part] = {}

    def recompute(self, k: int) -> bool:
        """Whether segment k is computed in this call for any sample."""
        if k not in self.made:
            self._chosen[k] = self._choose(k)
            self.made[k] = bool(self._chosen[k])
        return self.made[k]

    def part(self, k: int) -> Part | None:
        """The samples for which segment k is computed in this call; None where that is all of them, or none."""
        if not self.recompute(k) or self._chosen[k] == self.samples.all:
            return None
        return self._parts.setdefault(self._chosen[k], Part(self.samples, self._chosen[k]))

    def _choose(self, k: int) -> tuple[int, ...]:
        if k not in self.branch.ready:
            return self.samples.all
        policy, states = self.sites[k].policy, self.sampled.states[k]
        asked = tuple(g for g in self.samples.all if decided(policy, states[g], self._seen_by(k, g)))
        return self.samples.all if asked and self.sampled.batched is None else asked

    def _recomputed(self, k: int) -> tuple[int, ...]:
        # The first call of a branch computes everything, and nobody is asked.
        return self._chosen.get(k, self.samples.all)

    def close(self) -> None:
        """Tell every policy what was done to each sample, and keep what its probe showed at a recompute."""
        # Segments may ask for a decision for each block: the first call has found how many there are.
        self.sampled.fit([site.policy for site in self.sites])
        for k in self.made:
            policy, states, recomputed = self.sites[k].policy, self.sampled.states[k], self._recomputed(k)
            for g in self.samples.all:
                states[g] = policy.update(states[g], self._seen_by(k, g), g in recomputed)
            self._remember(k, bool(recomputed))

    def reference(self, k: int, signal: Signal, now: Tensor) -> Tensor:
        """What a signal will be compared with: of the samples that were reused what it was, if it counts from the recompute."""
        then, part = self.branch.references.get((k, signal)), self.part(k) if k in self._chosen else None
        if part is None or then is None or signal.since == "step" or then.shape != now.shape or not self.samples.divide(now):
            return now
        return part.put(then, part.take(now))

    def store(self, k: int, v: int, path: Path, t: float, value: Tensor) -> None:
        """Remember a value, a tensor of our own, of the samples that are recomputed."""
        history = self.sampled.store.setdefault((k, v, path), SampleHistory(self.samples))
        history.push(t, value, self.sites[k].reuse.length, self._recomputed(k))

    def stored(self, k: int, v: int, path: Path, t: float) -> Tensor:
        """What the history of a value says of the samples that are reused; any number for the others."""
        reused = tuple(g for g in self.samples.all if g not in self._recomputed(k))
        return self.sampled.store[k, v, path].value(t, self.sites[k].reuse, reused)

    def newest(self, k: int, v: int, path: Path) -> Tensor | None:
        """The last of what is stored of a value."""
        history = self.sampled.store.get((k, v, path))
        return history.places[0] if history is not None else None


def decisions_for(
    branch: Branch,
    sites: tuple[Site, ...],
    step: Step,
    peeker: Peeker,
    passes: int,
    note: Callable[[str], None],
    *,
    audited: bool = False,
    auditing: bool = False,
) -> Decisions:
    """The decisions of a branch's next call: for the batch, or for each sample.

    Args:
        passes: number of items of each sample; 0 where one decision holds for the batch.
        note: is told why it does all the same.
        audited, auditing: as ``Decisions``'; ``wrap`` refuses audits of single samples.
    """
    if passes and branch.sampled is None and branch.batch > passes:
        if branch.batch % passes == 0:
            branch.sampled = Sampled(Samples(branch.batch // passes, passes))
        else:
            note(f"one decision for a whole batch: its {branch.batch} items are not {passes} passes of each sample")
    if branch.sampled is None:
        return Decisions(branch, sites, step, peeker, audited=audited, auditing=auditing)
    return SampleDecisions(branch, branch.sampled, sites, step, peeker)
