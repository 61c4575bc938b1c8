"""The decisions of one model call: each segment's policy is asked once, and told at the end what was done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cachekit.branch import Branch, Key
from cachekit.errors import ConfigError
from cachekit.estimates import Miss, forecast_error
from cachekit.history import History
from cachekit.peek import Peeker
from cachekit.policy import Step
from cachekit.samples import Part, Samples
from cachekit.segments import Site
from cachekit.signals import LACKING, PROBES, Compared, Comparison, Of, Signal
from cachekit.spans import Span
from cachekit.tree import Path, tensors
from cachekit.verdict import decided


class Decisions:
    """Asks lazily, so that a policy can see what the blocks before its segment showed in this very call.

    Attributes:
        made: segment -> whether it is recomputed, as far as it was asked for.
        returned: copies of what was reused (blocks may write into theirs), for an audit to compare with; None where there is none.
        shown: what the call has shown of what policies look at: by span for blocks, by name for everything else.
        shares, module_shares: visit, or number of a module's call -> for which share of the batch it ran, where not all or none.
        waits: device synchronisations so far.
    """

    def __init__(
        self,
        branch: Branch,
        sites: tuple[Site, ...],
        step: Step,
        peeker: Peeker,
        samples: Samples | None = None,
        *,
        audited: bool = False,
        auditing: bool = False,
    ) -> None:
        self.branch, self.sites, self.step, self.peeker = branch, sites, step, peeker
        self.returned: dict[Key, Tensor] | None = {} if audited else None
        # Where the error of a forecast is looked at, each recompute notes what one would have missed.
        self.estimated = {k for k, site in enumerate(sites) if auditing or "estimate" in site.policy.required()}
        self.misses: dict[int, Miss] = {}
        self._estimates: dict[int, float] = {}
        # One decision for the batch: all of its items are passes of a single sample.
        self.samples = samples or Samples(1, branch.batch)
        self.waits = 0
        self.made: dict[int, bool] = {}
        self.shares: dict[int, float] = {}
        self.module_shares: dict[int, float] = {}
        self.shown: dict[Span | str, Tensor] = {}
        self._compared: dict[tuple[int, Signal], Compared] = {}
        if self.looks_at("sample") and branch.inputs.sample is not None:
            # A copy, since the model may write into it.
            self.shown["sample"] = branch.inputs.sample.detach().clone()

    def looks_at(self, of: Of) -> bool:
        """Whether some policy does."""
        return any(signal.of == of for site in self.sites for signal in site.signals)

    @property
    def whole(self) -> list[int]:
        """The sites that are the whole prediction."""
        return [k for k, site in enumerate(self.sites) if site.segment.is_model]

    def recompute(self, k: int) -> bool:
        """Whether segment k is computed in this call. Nothing stored forces it, whatever the policy says."""
        if k not in self.made:
            self.made[k] = k not in self.branch.ready or decided(self.sites[k].policy, self.branch.states[k], self._seen_by(k))
        return self.made[k]

    def show_modulated(
        self, block: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Sequence[Path] | None = None
    ) -> None:
        """Look into the first block, which is about to be called."""
        found = self.peeker.peek(block, original, args, kwargs, streams)
        if found is not None:
            self.shown["modulated"] = found

    def show_prediction(self, result: Any) -> None:
        """Note what the model returns: the first tensor of the sample's shape, else the first."""
        if self.looks_at("prediction"):
            found = [tensor for _, tensor in tensors(result)]
            shape = None if self.branch.inputs.sample is None else self.branch.inputs.sample.shape
            chosen = next((tensor for tensor in found if tensor.shape == shape), next(iter(found), None))
            if chosen is not None:
                self.shown["prediction"] = chosen.detach().clone()

    def part(self, k: int) -> Part | None:
        """The samples for which segment k is computed in this call; None where that is all of them, or none."""
        return None

    def _seen_by(self, k: int, g: int = 0, pooled: bool = False) -> Step:
        """What segment k's policy sees of sample g."""
        together = None if pooled else functools.partial(self._seen_by, k, g, True)
        estimated = functools.partial(self._estimate, k) if k in self.estimated else None
        look = functools.partial(self._compare, k, g, pooled)
        return dataclasses.replace(self.step, look=look, together=together, estimated=estimated)

    def _compare(self, k: int, g: int, pooled: bool, signal: Signal) -> Comparison:
        if signal not in self.sites[k].signals:
            raise ConfigError(f"{signal} is read, but not declared; add it to the policy's needs")
        if signal.of in PROBES and (self.branch.layout is None or not self.branch.layout.firsts[k]):
            raise ConfigError(LACKING[signal.of])
        compared = self._compared.get((k, signal))
        # What the call had not shown yet when it was asked for, it may have by now.
        if compared is None or compared.value is None:
            self._compared[k, signal] = compared = Compared(*self._pair(k, signal), self.samples, self._count)
        return Comparison(compared, g, pooled)

    def _pair(self, k: int, signal: Signal) -> tuple[Tensor | None, Tensor | None]:
        now = self._now(k, signal.of)
        if signal.of != "check":
            return now, self.branch.references.get((k, signal))
        span = self._span(k, signal.of)
        known = now is not None and span is not None and self.newest(k, span.end, span.leaves) is not None
        return (self._value(k, span.end, span.leaves, None) if known and span is not None else None), now

    def _span(self, k: int, of: Of) -> Span | None:
        return self.branch.layout.spans[k].get(of) if self.branch.layout is not None else None

    def _now(self, k: int, of: Of) -> Tensor | None:
        span = self._span(k, of)
        return self.shown.get(of if span is None else span)

    def _count(self, number: Tensor) -> None:
        self.waits += number.device.type != "cpu"

    def close(self) -> None:
        """Tell every policy what was done, and keep what its signals will be compared with."""
        for k, recomputed in self.made.items():
            policy, step = self.sites[k].policy, self._seen_by(k)
            self.branch.states[k] = policy.update(self.branch.states[k], step, recomputed)
            if k in self.misses:
                self.branch.misses[k] = self.misses[k]
            self._remember(k, recomputed)

    def _remember(self, k: int, recomputed: bool) -> None:
        """Keep what the signals of segment k will be compared with."""
        for signal in self.sites[k].signals:
            now, span = self._now(k, signal.of), self._span(k, signal.of)
            if now is None or not (recomputed or signal.since == "step"):
                continue
            if signal.of != "check":
                self.branch.references[k, signal] = self.reference(k, signal, now)
            elif recomputed and span is not None:
                self.keep(k, span.end, span.leaves, now, None)

    def reference(self, k: int, signal: Signal, now: Tensor) -> Tensor:
        """What a signal will be compared with, after a call that showed this."""
        return now

    def _is_check(self, k: int, v: int) -> bool:
        """Whether a stored value is not one that the segment reuses, but one that a policy compares with."""
        span = self._span(k, "check")
        return span is not None and span.end == v

    def _estimate(self, k: int) -> float:
        # A policy reads it when it decides and again when it counts what was spent.
        if k not in self._estimates:
            reuse, store = self.sites[k].reuse, self.branch.store
            histories = [history for (site, v, _), history in store.items() if site == k and not self._is_check(k, v)]
            self._estimates[k] = forecast_error(histories, reuse.time(self.step), reuse, self.branch.misses.get(k), self._count)
        return self._estimates[k]

    def predicted(self, k: int) -> float | None:
        """The error of what segment k reuses in this call, as its history foretells it; None where it can't."""
        found = self._estimate(k)
        return found if found < float("inf") else None

    def keep(self, k: int, v: int, path: Path, value: Tensor, entry: Tensor | None) -> None:
        """Store one value of segment k: the output, less beta times what entered."""
        reuse, value = self.sites[k].reuse, value.detach()
        # A tensor of our own: the model may write into its one afterwards.
        kept = value - reuse.beta * entry if entry is not None and value.is_floating_point() else value.clone()
        now = reuse.time(self.step)
        history = self.branch.store.get((k, v, path))
        if history is not None and k in self.estimated and history.entries[0][0] != now and not self._is_check(k, v):
            self.misses.setdefault(k, Miss(abs(now - history.entries[0][0]))).add(history, now, reuse, kept, value)
        self.store(k, v, path, now, kept)

    def store(self, k: int, v: int, path: Path, t: float, value: Tensor) -> None:
        """Remember a value, a tensor of our own."""
        self.branch.store.setdefault((k, v, path), History()).push(t, value, self.sites[k].reuse.length)

    def forecast(self, k: int, v: int, path: Path, entry: Tensor | None) -> Tensor:
        """What segment k returns there instead of computing it."""
        value = self._value(k, v, path, entry)
        if self.returned is not None:
            self.returned[k, v, path] = value.clone()
        return value

    def _value(self, k: int, v: int, path: Path, entry: Tensor | None) -> Tensor:
        reuse = self.sites[k].reuse
        value = self.stored(k, v, path, reuse.time(self.step))
        return value.add_(entry, alpha=reuse.beta) if entry is not None and value.is_floating_point() else value

    def stored(self, k: int, v: int, path: Path, t: float) -> Tensor:
        """What the history of a value says of it at t, as a tensor of its own."""
        return self.branch.store[k, v, path].value(t, self.sites[k].reuse)

    def newest(self, k: int, v: int, path: Path) -> Tensor | None:
        """The last of what is stored of a value."""
        history = self.branch.store.get((k, v, path))
        return history.entries[0][1] if history is not None else None
