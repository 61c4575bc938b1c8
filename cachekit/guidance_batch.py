"""Guidance in one batch: on reused steps the model runs on the conditional half alone, and the other half is rebuilt."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cachekit.batched import inputs_of
from cachekit.call import Given, KnownCall, PlainCall
from cachekit.graph import Graph, ModuleVisit, Signature, Visit
from cachekit.guidance import PassDecisions, Run
from cachekit.sampled import Batched, Sampled, Taken
from cachekit.samples import Part, Samples
from cachekit.signals import Of
from cachekit.sub_batch import check
from cachekit.tree import Path, arguments, replaced, tensors

ODD = "both passes run on every step: a batch of an odd number of items is not two passes"
DIFFER = "both passes run on every step where the two halves of the sample differ: they are not two passes over one sample"
UNKNOWN = "both passes run on every step, as it can't be known how to run one alone (in its reason a sample is a pass)"


class BatchedPasses(PassDecisions):
    """Both passes in one call.

    Where both run, so does every block, and segments within the model store the conditional half alone; where that half runs
    alone they are decided on. So what they hold is always the conditional pass's.

    Attributes:
        cond, uncond: the halves.
    """

    def __init__(self, *given: Any, cond: str, **options: Any) -> None:
        super().__init__(*given, **options)
        self.alone = False
        each = self.branch.batch // 2
        halves = Samples(2, each=each)
        chosen = (0, 1) if cond == "first" else (1, 0)
        self.cond, self.uncond = (Part(halves, [half]) for half in chosen)
        self.samples = Samples(1, max(1, each))
        if self.branch.blocks is None:
            self.branch.sampled = Sampled(halves) if self.obstacle is None else None

    @property
    def sampled(self) -> Sampled | None:
        """What is known of the halves; None where there are none."""
        return self.branch.sampled

    @property
    def batched(self) -> Batched | None:
        """Which tensors have the halves' rows; None where that can't be known."""
        return None if self.sampled is None else self.sampled.batched

    @cached_property
    def obstacle(self) -> str | None:
        """What speaks against two passes over one sample. Comparing the halves waits for the device."""
        sample = self.branch.inputs.sample
        if sample is None or not sample.ndim or sample.shape[0] % 2:
            return ODD
        self.waits += sample.device.type != "cpu"
        return None if torch.equal(*sample.detach().chunk(2)) else DIFFER

    def hindered(self, k: int) -> str | None:
        """Why the unconditional half can't be rebuilt in this call."""
        if self.sampled is not None and self.batched is None:
            return UNKNOWN
        return self.obstacle

    def recompute(self, k: int) -> bool:
        """Whether segment k is computed in this call; within the model each is wherever both passes run."""
        if not self.alone and not self.sites[k].segment.is_pass:
            self.made[k] = True
        return super().recompute(k)

    def run(self, run: Run, given: Given) -> tuple[PlainCall | None, Any]:
        """Run one call, on both halves or on the conditional one."""
        if self.branch.blocks is not None and not self.recompute(self.whole[0]) and self.batched is not None:
            return self._half(self.batched, run, given)
        call, result = run.all(given)
        for k in self.whole:
            reason = self.hindered(k)
            if reason is not None or self.batched is None:
                self.note(reason or UNKNOWN)
                self.forget(k)
                continue
            found, rows = dict(tensors(result)), self.batched.model[1].paths
            uncond, cond = ({path: part.take(found[path].detach()) for path in rows} for part in (self.uncond, self.cond))
            self.keep_pass(k, uncond, cond)
        return call, result

    def _half(self, batched: Batched, run: Run, given: Given) -> tuple[PlainCall, Any]:
        """Run the model on the conditional half, and put the other half beside what it returns."""
        self.alone, graph, layout = True, self.branch.graph, self.branch.layout
        inputs, returned = batched.model
        check(inputs, dict(arguments(*given)))
        call = KnownCall(halved(graph, batched), layout, self) if graph is not None and layout is not None else PlainCall()
        result = run.under(call, inputs_of(self.cond, given))
        if isinstance(call, KnownCall):
            call.finish()
        found = dict(tensors(result))
        check(returned, found, self.cond)
        self.shares = {v: self.cond.share for v, ran in enumerate(call.recomputed) if ran}
        self.module_shares = {n: self.cond.share for n, ran in enumerate(call.modules) if ran}
        cond = {path: found[path].detach() for path in returned.paths}
        uncond = self.rebuilt(self.whole[0], cond)
        return call, replaced(result, {path: self._joined(cond[path], uncond[path]) for path in cond})

    def _joined(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return torch.cat([cond, uncond] if self.cond.chosen == (0,) else [uncond, cond])

    def keep(self, k: int, v: int, path: Path, value: Tensor, entry: Tensor | None) -> None:
        """Store one value of segment k; within the model, of the conditional half."""
        within = not self.sites[k].segment.is_pass and not self._is_check(k, v)
        if within and not self.alone and self.sampled is not None:
            # What has no rows for each half is found out at the end of the first call, and then nothing is reused.
            value, entry = self._rows(value), None if entry is None else self._rows(entry)
        super().keep(k, v, path, value, entry)

    def _rows(self, tensor: Tensor) -> Tensor:
        return self.cond.take(tensor) if self.cond.samples.divide(tensor) else tensor

    def _now(self, k: int, of: Of) -> Tensor | None:
        # What the conditional half shows, on every step: the sample and the prediction are always those of both.
        now = super()._now(k, of)
        return now if now is None or (self.alone and of not in ("sample", "prediction")) else self._rows(now)


def halved(graph: Graph, batched: Batched) -> Graph:
    """The graph of a call of one half."""
    visits = []
    for v, (visit, (given, _)) in enumerate(zip(graph.visits, batched.visits, strict=True)):
        modules = tuple(_module(seen, *batched.modules[v, n]) for n, seen in enumerate(visit.modules))
        visits.append(_visit(visit, given, modules))
    return replace(graph, visits=tuple(visits))


def _visit(visit: Visit, given: Taken, modules: tuple[ModuleVisit, ...]) -> Visit:
    pairs = zip(visit.streams, visit.signatures, strict=True)
    return replace(visit, signatures=tuple(_half(path, sig, given) for (path, _), sig in pairs), modules=modules)


def _module(seen: ModuleVisit, given: Taken, returned: Taken) -> ModuleVisit:
    return replace(
        seen,
        inputs=tuple((path, _half(path, sig, given)) for path, sig in seen.inputs),
        returned=tuple((path, _half(path, sig, returned)) for path, sig in seen.returned),
    )


def _half(path: Path, sig: Signature, taken: Taken) -> Signature:
    shape, dtype, device = sig
    return ((shape[0] // 2, *shape[1:]), dtype, device) if path in taken.paths else sig
