"""A threshold on what all the blocks before the segment show."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class front_change(Policy[None]):
    """As ``change``, of the residual of all the blocks before the segment together (DBCache, cache-dit).

    Where the model does something between them, it is that of the blocks since then. Costs one device synchronisation a step.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"front"})
    threshold: NonNegativeFloat

    def decide(self, state: None, step: Step) -> bool:
        # Written this way round, a change that is no number recomputes.
        return not step.front_change <= self.threshold
