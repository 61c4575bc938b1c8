"""The decisions of one model call: each segment's policy is asked once, and told at the end what was done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from torch import Tensor

from cachekit.policy import Step
from cachekit.reuse import History
from cachekit.segments import Site, Span
from cachekit.session import Branch
from cachekit.tree import Path


class Decisions:
    """Asks lazily, so that a policy can see what the blocks before its segment showed in this very call."""

    def __init__(self, branch: Branch, sites: tuple[Site, ...], step: Step) -> None:
        self.branch, self.sites, self.step = branch, sites, step
        self.waits = 0
        self.made: dict[int, bool] = {}
        self.residuals: dict[Span, Tensor] = {}

    @property
    def whole(self) -> list[int]:
        """The sites that are the whole prediction."""
        return [k for k, site in enumerate(self.sites) if site.segment.is_model]

    def recompute(self, k: int) -> bool:
        """Whether segment k is computed in this call. Nothing stored forces it, whatever the policy says."""
        if k not in self.made:
            self.made[k] = k not in self.branch.ready or self.sites[k].policy.decide(self.branch.states[k], self._seen_by(k))
        return self.made[k]

    def _seen_by(self, k: int) -> Step:
        if self.branch.layout is None or not self.branch.layout.firsts[k]:
            return self.step
        probe, front = (functools.partial(self._change, k, kind) for kind in ("probe", "front"))
        return dataclasses.replace(self.step, probe=probe, front=front)

    def _spans(self, k: int) -> Mapping[str, Span]:
        return self.branch.layout.spans[k] if self.branch.layout is not None else {}

    def _change(self, k: int, kind: str) -> float:
        span = self._spans(k).get(kind)
        then, now = self.branch.probes.get((k, kind)), self.residuals.get(span) if span is not None else None
        if then is None or now is None or then.shape != now.shape:
            return float("inf")
        change = (now - then).abs().mean() / then.abs().mean()
        self.waits += change.device.type != "cpu"
        return float(change)

    def close(self) -> None:
        """Tell every policy what was done, and keep what its probe showed at a recompute."""
        for k, recomputed in self.made.items():
            policy, step = self.sites[k].policy, self._seen_by(k)
            self.branch.states[k] = policy.update(self.branch.states[k], step, recomputed)
            for kind, span in self._spans(k).items():
                if recomputed and span in self.residuals:
                    self.branch.probes[k, kind] = self.residuals[span]

    def keep(self, k: int, v: int, path: Path, value: Tensor, entry: Tensor | None) -> None:
        """Store one value of segment k: the output, less beta times what entered."""
        reuse, value = self.sites[k].reuse, value.detach()
        # A tensor of our own: the model may write into its one afterwards.
        kept = value - reuse.beta * entry if entry is not None and value.is_floating_point() else value.clone()
        self.branch.store.setdefault((k, v, path), History()).push(reuse.time(self.step), kept, reuse.length)

    def forecast(self, k: int, v: int, path: Path, entry: Tensor | None) -> Tensor:
        """What segment k returns there instead of computing it."""
        reuse = self.sites[k].reuse
        value = self.branch.store[k, v, path].value(reuse.time(self.step), reuse)
        return value.add_(entry, alpha=reuse.beta) if entry is not None and value.is_floating_point() else value
