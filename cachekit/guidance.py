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
from cachekit.policy import Step
from cachekit.refresh import refreshes
from cachekit.reuse import Reuse, push
from cachekit.segments import UNCOND, Site
from cachekit.session import Branch, Generation
from cachekit.trajectory import Comparer
from cachekit.tree import Path, replaced, tensors, without_tensors
from cachekit.whole import VISIT

Cond = Literal["first", "last", "before"]
HALVES = ("first", "last")
BEFORE = "before"
# What pipelines call it, in diffusers' cache_context as well.
COND = "cond"

NO_PEER = (
    "the unconditional pass ran where it could have been rebuilt: at that step no conditional pass had run before it on the same "
    "sample; name the passes with model.cachekit.branch('cond') and ('uncond'), the former first, or say wrap(..., cond='before') "
    "where the first call of each step is the conditional one, cond='first' or 'last' where it is that half of one batch"
)
OTHERS = "the unconditional pass ran on every step: the two passes return other tensors"


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


class SeparatePasses(PassDecisions):
    """Passes that are calls of their own: branches."""

    def __init__(self, *given: Any, generation: Generation, cond: str | None, comparer: Comparer, **options: Any) -> None:
        super().__init__(*given, **options)
        self.is_cond = _is_cond(self.branch, cond)
        before = comparer.waits
        self.peer = None if self.is_cond else _peer(self.branch, generation, cond, comparer)
        self.waits += comparer.waits - before

    @property
    def whole(self) -> list[int]:
        """The sites that are the whole prediction; the conditional pass has none."""
        return [] if self.is_cond else super().whole

    def hindered(self, k: int) -> str | None:
        """Why the unconditional pass can't be rebuilt in this call."""
        return NO_PEER if self.peer is None and self.sites[k].reuse.beta else None

    def run(self, run: Run, given: Given) -> tuple[PlainCall | None, Any]:
        """Run one call, or rebuild what it would return from the call before it."""
        branch, peers = self.branch, {} if self.peer is None else self.peer.prediction
        if branch.blocks is not None and self.whole and not self.recompute(self.whole[0]):
            return None, replaced(branch.structure, self.rebuilt(self.whole[0], peers))
        call, result = run.all(given)
        found = {path: tensor.detach() for path, tensor in tensors(result)}
        if self.is_cond:
            # A copy: samplers may write into theirs.
            beta = any(site.segment.is_pass and site.reuse.beta for site in self.sites)
            branch.prediction = {path: tensor.clone() for path, tensor in found.items()} if beta else {}
        for k in self.whole:
            self._keep(k, found, peers, without_tensors(result))
        return call, result

    def _keep(self, k: int, found: dict[Path, Tensor], peers: dict[Path, Tensor], structure: Any) -> None:
        reason = self.hindered(k)
        if reason is None and self.sites[k].reuse.beta and _signatures(found) != _signatures(peers):
            reason = OTHERS
        if reason is None:
            self.keep_pass(k, found, peers)
            self.branch.structure = structure
        else:
            self.note(reason)
            self.forget(k)


def _signatures(found: dict[Path, Tensor]) -> dict[Path, Any]:
    return {path: signature(tensor) for path, tensor in found.items()}


def _is_cond(branch: Branch, cond: str | None) -> bool:
    return branch.leads if cond == BEFORE else branch.name.text == COND


def _peer(branch: Branch, generation: Generation, cond: str | None, comparer: Comparer) -> Branch | None:
    """The conditional pass, where it has run at this very step."""
    for other in generation.branches:
        if _is_cond(other, cond) and other is not branch and other.t == branch.t:
            if branch.inputs.sample is None or other.trace is None:
                # Nothing but their numbers tells a solver's two evaluations at one timestep apart.
                same = branch.inputs.sample is None and other.trace is None and other.i == branch.i
            else:
                same = other.trace.ends_at(branch.inputs.sample, comparer)
            if same and other.prediction:
                return other
    return None
