"""A threshold on what the block before the segment shows."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class change(Policy[None]):
    """Recompute when the probe block's residual has changed by more than the threshold since the last recompute.

    The change is mean|r - r_last| / mean|r_last| (First-Block Cache, ParaAttention); on segments ``"middle"`` the probe is the
    first block. In a batch the sample that changed most decides. Costs one device synchronisation a step.

    Args:
        threshold: the largest change that is passed over.
        pooled: take the means over the whole batch instead, as the authors' code and diffusers do.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probe"})
    threshold: NonNegativeFloat
    _: KW_ONLY
    pooled: bool = False

    def decide(self, state: None, step: Step) -> bool:
        # Written this way round, a change that is no number recomputes.
        return not (step.pooled if self.pooled else step).change <= self.threshold
