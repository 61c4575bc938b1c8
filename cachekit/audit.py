"""Audits: what a reused step would have come to in full, run beside it and measured against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.branch import Branch
from cachekit.call import Original, PlainCall
from cachekit.decisions import Decisions
from cachekit.estimates import Error
from cachekit.stats import Audit, SiteAudit
from cachekit.tree import get, replaced, tensors, walk
from cachekit.whole import VISIT

WRITES = "the model writes into its own buffers when it runs, and would in the shadow as well: nothing is audited"


class ShadowCall(PlainCall):
    """A full call that stores nothing, and compares what it computes with what was reused in its place.

    Args:
        decisions: of the reused step, which is over.
    """

    def __init__(self, decisions: Decisions) -> None:
        super().__init__()
        self._expected = decisions.branch.blocks or []
        self._reused = decisions.returned or {}
        self._in_modules = {k for k, site in enumerate(decisions.sites) if site.segment.names}
        self._called = 0
        self.errors: dict[int, Error] = {k: Error() for k, _, _ in self._reused}

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block.

        Raises:
            ValueError: another block than the reused step had here.
        """
        v, self._called = len(self.recomputed), 0
        if self._expected[v : v + 1] != [block]:
            raise ValueError("another sequence of blocks in the full pass")
        result = super().visit(block, original, args, kwargs)
        self.compare(v, result)
        return result

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module of the block that is being visited."""
        v, n = len(self.recomputed) - 1, self._called
        self._called += 1
        result = super().module(name, original, args, kwargs)
        for (k, visit, path), value in self._reused.items():
            if visit == v and k in self._in_modules and path[0] == n:
                self.errors[k].add(value, get(result, path[1:]))
        return result

    def compare(self, v: int, result: Any) -> None:
        """Compare one visit's result, or the model's (VISIT)."""
        for (k, visit, path), value in self._reused.items():
            if visit == v and k not in self._in_modules:
                self.errors[k].add(value, get(result, path))


class Shadow:
    """What an audit needs of a step that may turn out to be a reused one, taken before the model can write into it.

    Args:
        model: the wrapped one.
        args, kwargs: of the call.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        copies: dict[int, Tensor] = {}
        # One copy of each tensor, so that arguments that are one object stay one.
        found = {path: copies.setdefault(id(tensor), tensor.detach().clone()) for path, tensor in tensors((args, kwargs))}
        self.args, self.kwargs = replaced((args, kwargs), found)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Random numbers drawn within are drawn again afterwards."""
        generators = [leaf for _, leaf in walk((self.args, self.kwargs)) if isinstance(leaf, torch.Generator)]
        states = [generator.get_state() for generator in generators]
        devices = {parameter.device for parameter in self.model.parameters()}
        with ExitStack() as stack:
            for kind in ("cuda", "xpu"):
                # Where there is none of the kind, it keeps the CPU's generator alone.
                indices = [device.index for device in devices if device.type == kind]
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
            try:
                yield
            finally:
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)


class Auditor:
    """Says which steps of a wrapped model are audited.

    Args:
        every: k, to audit the k-th, 2k-th, ... reused step of each branch of a generation; None for none.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.writes = False

    @property
    def on(self) -> bool:
        """Whether anything is audited."""
        return self.every is not None and not self.writes

    def shadow(self, model: nn.Module, branch: Branch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shadow | None:
        """What an audit of the coming step needs, if there is to be one should it be reused."""
        # The first call of a branch is a full one.
        if self.every is None or not self.on or branch.blocks is None or (branch.reused + 1) % self.every:
            return None
        return Shadow(model, args, kwargs)

    @contextmanager
    def watching(self, model: nn.Module, full: bool) -> Iterator[None]:
        """Find out whether a full call writes into the model's buffers; one more would then change what the next step returns."""
        if self.every is None or not full:
            yield
            return
        before = _versions(model)
        yield
        self.writes = self.writes or _versions(model) != before


def _versions(model: nn.Module) -> list[int | None]:
    return [None if buffer.is_inference() else buffer._version for buffer in model.buffers()]


def audit(decisions: Decisions, call: ShadowCall, output: Any, full: Any) -> Audit:
    """What a full pass that is over shows of the reused step.

    Args:
        decisions: of the reused step.
        call: the full pass.
        output, full: what the model returned reused and in full.
    """
    call.compare(VISIT, full)
    whole = Error()
    for path, tensor in tensors(full):
        whole.add(get(output, path), tensor)
    step = decisions.step
    sites = tuple(SiteAudit(k, error.value, decisions.predicted(k)) for k, error in sorted(call.errors.items()))
    return Audit(step.i, step.t, step.branch, whole.value, sites)
