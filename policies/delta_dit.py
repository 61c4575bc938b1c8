"""Delta-DiT, "delta-dit-2-14"."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt, validate_call
from pydantic.dataclasses import dataclass

from cachekit.policies.every import every
from cachekit.policy import STRICT, Policy, Preset, Step
from cachekit.segments import Segment

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class stage(Policy[None]):
    """Recompute in the first share of the steps, or after it.

    Where the number of steps is unknown it goes by t, as if t fell evenly through its range; where that is unknown as well,
    every step is full.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"end"})
    share: Share
    late: bool = False

    def decide(self, state: None, step: Step) -> bool:
        if step.steps is not None:
            return (step.i >= self.share * step.steps) is self.late
        return step.range is None or (step.t <= (1 - self.share) * step.range) is self.late


@validate_call
def delta_dit(n: PositiveInt, blocks: PositiveInt = 14, early: Share = 0.5) -> Preset:
    """Reuse the residual of the last blocks in the early steps, and that of the first blocks later (Delta-DiT, arXiv 2406.01125).

    Needs the number of steps, ``model.cachekit.session(steps=...)``, or a known range of t; stats say where it was off.
    On other segments it is ``every(n)``.

    Args:
        n: period of what is reused.
        blocks: how many at either end. The default is half of the 28 of the paper's models; it must fit twice.
        early: share of the steps in which the last blocks are reused. The paper tunes it for each model; half is ours.
    """
    rear = Segment(-blocks, None, policy=every(n) | stage(early, late=True))
    front = Segment(0, blocks, policy=every(n) | stage(early))
    return Preset(every(n), segments=[front, rear], reuse="residual")
