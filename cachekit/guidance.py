"""The unconditional pass of guidance as a site: rebuilt from what the conditional pass returns at the very same step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

from torch import Tensor

from cachekit.call import Given, GraphChanged, PlainCall
from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import has_signature, signature
from cachekit.history import push
from cachekit.policy import Step
from cachekit.refresh import refreshes
from cachekit.reuse import Reuse
from cachekit.segments import UNCOND, Site
from cachekit.tree import Path
from cachekit.whole import VISIT

Cond = Literal["first", "last", "before"]
HALVES = ("first", "last")
BEFORE = "before"


class Carrying(Reuse, Protocol):
    """A reuse of the unconditional pass whose stored value changes from one reused step to the next. ``length`` 1, ``beta`` 1."""

    def carry(self, value: Tensor, step: Step) -> Tensor:
        """What is stored, at a reused step.

        Args:
            value: what was stored until now: the prediction of the unconditional pass less that of the conditional one at the
                last step where both ran, as it was carried since.
            step: this step.

        Returns:
            A tensor of the same shape and dtype, which is what the next reused step gets.
        """
        ...


def carries(reuse: Any) -> TypeGuard[Carrying]:
    """Whether a reuse changes what is stored."""
    return callable(getattr(reuse, "carry", None))


def check(sites: tuple[Site, ...], cond: Any, *, per_sample: bool, audited: bool) -> None:
    """Refuse what can't be done.

    Raises:
        ConfigError: what is wrong, and what to write instead.
    """
    found = [site for site in sites if site.segment.is_pass]
    if cond not in (None, BEFORE, *HALVES):
        raise ConfigError(
            f"cond={cond!r}: write 'first' or 'last', the conditional half of one batch; 'before' where the passes are separate "
            "calls, the conditional one first; or None where they are named"
        )
    if cond is not None and not found:
        raise ConfigError(f"cond={cond!r}, and no segment is {UNCOND!r}; leave cond out, or add the segment")
    for site in sites:
        if carries(site.reuse) and not (site.segment.is_pass and site.reuse.length == 1 and site.reuse.beta == 1):
            raise ConfigError(f"{site.reuse!r} rebuilds one pass of guidance from the other: give it segments={UNCOND!r}")
    if any("estimate" in site.policy.required() for site in found):
        raise ConfigError(f"no error is estimated for segments={UNCOND!r}; leave out the policy that reads step.estimate")
    if found and per_sample:
        raise ConfigError(f"per_sample: segments={UNCOND!r} takes one decision for the batch; leave one of them out")
    if cond in HALVES and audited:
        raise ConfigError("audit_every: a batch of both passes is not audited; leave it out, or sample with separate calls")
    if cond in HALVES and any(refreshes(site.reuse) for site in sites):
        raise ConfigError(f"tokens are recomputed for a whole batch; with segments={UNCOND!r} in one batch take another reuse")


@dataclass(frozen=True)
class Run:
    """How to run the model.

    Attributes:
        all: on the whole batch, with these arguments.
        under: under a call, with these arguments.
    """

    all: Callable[[Given], tuple[PlainCall, Any]]
    under: Callable[[PlainCall, Given], Any]


class PassDecisions(Decisions, ABC):
    """The decisions of one call where the unconditional pass is a site. What enters that site is the other pass's prediction."""

    def __init__(self, *given: Any, note: Callable[[str], None], **options: Any) -> None:
        super().__init__(*given, **options)
        self.note = note
        self.estimated = {k for k in self.estimated if not self.sites[k].segment.is_pass}

    @abstractmethod
    def run(self, run: Run, given: Given) -> tuple[PlainCall | None, Any]:
        """Run one call; None in place of the call where the model was not run."""

    @abstractmethod
    def hindered(self, k: int) -> str | None:
        """Why the unconditional pass can't be rebuilt in this call."""

    def recompute(self, k: int) -> bool:
        """Whether segment k is computed in this call."""
        if k not in self.made and self.sites[k].segment.is_pass:
            reason = self.hindered(k)
            if reason is not None:
                self.note(reason)
                self.made[k] = True
        return super().recompute(k)

    def predicted(self, k: int) -> float | None:
        """Of the unconditional pass nothing is foretold."""
        return None if self.sites[k].segment.is_pass else super().predicted(k)

    def keep_pass(self, k: int, values: dict[Path, Tensor], peers: dict[Path, Tensor]) -> None:
        """Store the unconditional pass's prediction, less the share of the conditional one's that comes back on reuse.

        Raises:
            GraphChanged: what is stored has another shape, dtype or device.
        """
        for path, tensor in values.items():
            stored = self.newest(k, VISIT, path)
            if stored is not None and not has_signature(stored, signature(tensor)):
                raise GraphChanged("another shape, dtype or device")
            self.keep(k, VISIT, path, tensor, peers[path] if self.sites[k].reuse.beta else None)
        self.branch.ready.add(k)
        self.made[k] = True

    def forget(self, k: int) -> None:
        """Drop what is stored of the unconditional pass: the last time that it ran is not what it is from."""
        for key in [key for key in self.branch.store if key[:2] == (k, VISIT)]:
            del self.branch.store[key]
        self.branch.ready.discard(k)
        self.made[k] = True

    def rebuilt(self, k: int, peers: dict[Path, Tensor]) -> dict[Path, Tensor]:
        """The unconditional pass's prediction from the conditional one's.

        Raises:
            GraphChanged: the latter is not as it was when the former was stored.
        """
        reuse, found = self.sites[k].reuse, {}
        for site, v, path in list(self.branch.store):
            if (site, v) != (k, VISIT):
                continue
            (time, newest), *_ = self.branch.store[k, VISIT, path].entries
            if reuse.beta and not has_signature(peers.get(path), signature(newest)):
                raise GraphChanged("another shape, dtype or device")
            if carries(reuse) and newest.is_floating_point():
                push(self.branch.store, (k, VISIT, path), time, reuse.carry(newest, self.step))
            found[path] = self.forecast(k, VISIT, path, peers[path] if reuse.beta else None)
        return found
