"""A limit on reuses in a row."""

from __future__ import annotations

from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class at_most(Policy[int]):
    """Recompute after n reuses in a row, whoever decided them."""

    n: NonNegativeInt

    def init(self) -> int:
        return 0

    def decide(self, state: int, step: Step) -> bool:
        return state >= self.n

    def update(self, state: int, step: Step, recomputed: bool) -> int:
        return 0 if recomputed else state + 1
