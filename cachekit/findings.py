"""What a check found: one property of one site after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachekit.tree import replaced, tensors


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


def copied(value: Any) -> Any:
    """Nested arguments with tensors of their own."""
    return replaced(value, {path: tensor.clone() for path, tensor in tensors(value)})


def leaves(result: Any) -> list[Tensor]:
    """Copies of the tensors in a result: what comes after may write into them."""
    return [tensor.clone() for _, tensor in tensors(result)]


def equal(site: str, claim: str, expected: list[Tensor], got: list[Tensor]) -> Finding:
    """Whether two results are the same, bit for bit."""
    holds = len(expected) == len(got) and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    return Finding(site, claim, holds, "bit-equal" if holds else f"relative error {_error(expected, got):.2g}")


def close(site: str, claim: str, expected: list[Tensor], got: list[Tensor], depth: int) -> Finding:
    """Whether two results are the same but for the rounding of a residual that so many blocks pass on."""
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
