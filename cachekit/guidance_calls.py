"""Guidance in separate calls: the unconditional branch is rebuilt from what the conditional one has just returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cachekit.branch import Branch
from cachekit.call import Given, PlainCall
from cachekit.graph import signature
from cachekit.guidance import BEFORE, PassDecisions, Run
from cachekit.session import Generation
from cachekit.trajectory import Comparer
from cachekit.tree import Path, replaced, tensors, without_tensors

# What pipelines call the conditional pass, in diffusers' cache_context as well.
COND = "cond"

NO_PEER = (
    "the unconditional pass ran where it could have been rebuilt: at that step no conditional pass had run before it on the same "
    "sample, or several; name the passes with model.cachekit.branch('cond') and ('uncond'), the former first, or say "
    "wrap(..., cond='before') where the first call of each step is the conditional one, cond='first' or 'last' where it is that "
    "half of one batch"
)
OTHERS = "the unconditional pass ran on every step: the two passes return other tensors"


class SeparatePasses(PassDecisions):
    """Passes that are calls of their own: branches."""

    def __init__(self, *given: Any, generation: Generation, cond: str | None, comparer: Comparer, **options: Any) -> None:
        super().__init__(*given, **options)
        self.is_cond = _is_cond(self.branch, cond)
        before = comparer.waits
        self.peer = None if self.is_cond else _peer(self.branch, generation, cond, comparer)
        self.waits += comparer.waits - before
        # Neither this pass nor any other is named: it may be the conditional one, or a batch of both.
        self.unnamed = cond is None and not self.branch.name.text and not any(_is_cond(b, cond) for b in generation.branches)

    @property
    def whole(self) -> list[int]:
        """The sites that are the whole prediction; the conditional pass has none."""
        return [] if self.is_cond else super().whole

    def hindered(self, k: int) -> str | None:
        """Why the unconditional pass can't be rebuilt in this call."""
        return NO_PEER if self.unnamed or (self.peer is None and self.sites[k].reuse.beta) else None

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
    """The conditional pass, where it has run at this very step; None of several, since which one is meant can't be known."""
    found = [other for other in generation.branches if _is_cond(other, cond) and _beside(other, branch, comparer)]
    return found[0] if len(found) == 1 else None


def _beside(other: Branch, branch: Branch, comparer: Comparer) -> bool:
    if other is branch or other.t != branch.t or not other.prediction:
        return False
    if branch.inputs.sample is None or other.trace is None:
        # Nothing but their numbers tells a solver's two evaluations at one timestep apart.
        return branch.inputs.sample is None and other.trace is None and other.i == branch.i
    return other.trace.ends_at(branch.inputs.sample, comparer)
