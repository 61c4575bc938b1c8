"""Guards of the last steps."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import NonNegativeFloat, NonNegativeInt
from pydantic.dataclasses import dataclass

from cachekit.policy import STRICT, Policy, Step


@dataclass(frozen=True, config=STRICT)
class last(Policy[None]):
    """Recompute the last n steps. Needs their number: ``model.cachekit.session(steps=...)``; stats say where it was off."""

    needs: ClassVar[frozenset[str]] = frozenset({"steps"})
    n: NonNegativeInt

    def decide(self, state: None, step: Step) -> bool:
        return step.steps is not None and step.i >= step.steps - self.n


@dataclass(frozen=True, config=STRICT)
class tail(Policy[None]):
    """Recompute the last share of the steps, at least two; where their number is unknown, t under that share of its range."""

    needs: ClassVar[frozenset[str]] = frozenset({"end"})
    share: NonNegativeFloat = 0.06

    def decide(self, state: None, step: Step) -> bool:
        if step.steps is not None:
            return step.i >= step.steps - max(2, math.ceil(self.share * step.steps))
        return step.range is not None and step.t < self.share * step.range
