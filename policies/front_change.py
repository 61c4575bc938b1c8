"""A threshold on what all the blocks before the segment show."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class front_change(Policy[None]):
    """As ``change``, of the residual of all the blocks before the segment together (DBCache, cache-dit).

    Where the model does something between them, it is that of the blocks since then. Costs one device synchronisation a step.

    Args:
        threshold, pooled: as ``change``'s.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"front"})
    threshold: NonNegativeFloat
    _: KW_ONLY
    pooled: bool = False

    def decide(self, state: None, step: Step) -> bool:
        # Written this way round, a change that is no number recomputes.
        return not (step.pooled if self.pooled else step).front_change <= self.threshold
