"""Fixed period."""

from __future__ import annotations

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class every(Policy[None]):
    """Recompute at steps 0, n, 2n, ..., counted over the whole generation (FORA, arXiv 2407.01425; Skip-Cache, 2411.17616)."""

    n: PositiveInt

    def decide(self, state: None, step: Step) -> bool:
        return step.i % self.n == 0
