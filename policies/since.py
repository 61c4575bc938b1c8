"""From some step on."""

from __future__ import annotations

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class since(Policy[None]):
    """Recompute step n and all after it; steps count from 0."""

    n: NonNegativeInt

    def decide(self, state: None, step: Step) -> bool:
        return step.i >= self.n
