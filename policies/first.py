"""A warm-up."""

from __future__ import annotations

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class first(Policy[None]):
    """Recompute the first n steps."""

    n: NonNegativeInt

    def decide(self, state: None, step: Step) -> bool:
        return step.i < self.n
