"""Check on the user's own model, block by block, that reuse is as exact as it claims to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.anatomy import graph
from cachekit.errors import ModelError
from cachekit.policies import every, first
from cachekit.tree import tensors
from cachekit.wrap import Handle, unwrap, wrap


@dataclass(frozen=True)
class Finding:
    """One property of one site: whether it holds, and what was seen."""

    site: str
    claim: str
    holds: bool
    seen: str


@dataclass(frozen=True)
class Report:
    """What ``cachekit.check`` found. ``ok`` where everything holds; print it to read it."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def __str__(self) -> str:
        width = max((len(finding.site) for finding in self.findings), default=0)
        lines = [f"{'ok  ' if f.holds else 'FAIL'} {f.site.ljust(width)}  {f.claim}: {f.seen}" for f in self.findings]
        failed = sum(not finding.holds for finding in self.findings)
        return "\n".join([*lines, f"{len(lines) - failed} of {len(lines)} properties hold"])


def check(model: nn.Module, *inputs: Any, adapter: Adapter | str | None = None, **kwargs: Any) -> Report:
    """Run the exactness properties on a model with the arguments of one call.

    For the whole stack and for each block (or unit of blocks) alone: a step whose inputs equal the stored step's gives the
    same output, bit for bit with the stored output and within rounding with the residual, and the blocks do not run.

    Args:
        model: any module that is not wrapped yet; it is left as it was.
        inputs, kwargs: the arguments of one call of it.
        adapter: as in ``wrap``.

    Raises:
        ModelError: the model is wrapped, or no block of it is called.
    """
    if "cachekit" in model.__dict__:
        raise ModelError("the model is wrapped; cachekit.unwrap(model) first, check() wraps it in its own ways")
    facts = adapter_for(model, adapter)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            findings = tuple(_findings(model, facts, inputs, kwargs))
    finally:
        unwrap(model)
        model.train(training)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    same = all(list(after[name]) == list(old) and all(after[name][key] is old[key] for key in old) for name, old in before.items())
    return Report(
        (
            *findings,
            Finding("model", "unwrap restores every __dict__", same, "as it was" if same else "something stayed behind"),
        )
    )


def _findings(model: nn.Module, adapter: Adapter, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Finding]:
    expected = _leaves(model(*inputs, **kwargs))
    again = _leaves(model(*inputs, **kwargs))
    yield _equal("model", "two uncached calls agree", expected, again)
    units = len(graph(model, *inputs, adapter=adapter, **kwargs).blocks) // adapter.unit
    wrap(model, every(1), adapter=adapter)
    with _one_branch(model):
        yield _equal("model", "every(1) equals the uncached model", expected, _leaves(model(*inputs, **kwargs)))
    sites: list[tuple[str, Any]] = [("model", "model"), ("all blocks", "all")]
    sites += [(f"block {u}" if adapter.unit == 1 else f"unit {u}", (u, u + 1)) for u in range(units)]
    for name, segments in sites:
        for reuse in ("output", "residual"):
            if not (name == "model" and reuse == "residual"):
                yield from _reused(model, adapter, name, segments, reuse, expected, inputs, kwargs)


def _reused(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    segments: Any,
    reuse: str,
    expected: list[Tensor],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[Finding]:
    wrap(model, first(1), segments=segments, reuse=reuse, adapter=adapter)
    with _one_branch(model):
        yield _equal(name, f"{reuse}: the first step equals the uncached model", expected, _leaves(model(*inputs, **kwargs)))
        reused = _leaves(model(*inputs, **kwargs))
        record = _handle(model).stats.records[-1].recomputed
    ran = sum(record)
    yield Finding(
        name,
        f"{reuse}: its blocks do not run on a reused step",
        ran < len(record),
        f"{ran} of {len(record)} blocks ran",
    )
    claim = f"{reuse}: a reused step with equal inputs equals the stored one"
    if reuse == "output":
        yield _equal(name, claim, expected, reused)
    else:
        yield _close(name, claim, expected, reused, len(record))


def _handle(model: nn.Module) -> Handle:
    handle: Handle = model.__dict__["cachekit"]
    return handle


@contextmanager
def _one_branch(model: nn.Module) -> Iterator[None]:
    # In a named branch of an explicit session the same inputs again are a further step, not another branch.
    with _handle(model).session(), _handle(model).branch("check"):
        yield


def _leaves(result: Any) -> list[Tensor]:
    return [tensor.clone() for _, tensor in tensors(result)]


def _equal(site: str, claim: str, expected: list[Tensor], got: list[Tensor]) -> Finding:
    holds = len(expected) == len(got) and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return Finding(site, claim, holds, "bit-equal" if holds else f"relative error {_error(expected, got):.2g}")


def _close(site: str, claim: str, expected: list[Tensor], got: list[Tensor], depth: int) -> Finding:
    # x + (y - x) rounds twice per value; every block after it passes that on, and may double it.
    eps = max(float(torch.finfo(tensor.dtype).eps) for tensor in expected if tensor.is_floating_point())
    error = _error(expected, got)
    return Finding(site, claim, error <= 4 * eps * 2 ** min(depth, 12), f"relative error {error:.2g}")


def _error(expected: list[Tensor], got: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        scale = torch.linalg.vector_norm(a.float())
        worst = max(worst, float(torch.linalg.vector_norm(a.float() - b.float()) / scale.clamp_min(1e-30)))
    return worst
