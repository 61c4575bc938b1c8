"""Delta-DiT, "delta-dit-2-14"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt, validate_call
from pydantic.dataclasses import dataclass as validated
from torch import nn

from cachekit.adapter import Adapter
from cachekit.blocks import find_blocks
from cachekit.errors import ConfigError
from cachekit.for_model import ForModel
from cachekit.policies.every import every
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.segments import Segment

Share = Annotated[float, Field(ge=0, le=1)]

# Half of the blocks of the paper's models.
PAPER = 14


@validated(frozen=True, config=STRICT)
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


@dataclass(frozen=True)
class _Half(ForModel):
    """``delta_dit`` of half of the model's stack."""

    n: int
    early: float

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        units = len(find_blocks(model, adapter)) // adapter.unit
        if units < 2:
            raise ConfigError(f"Delta-DiT needs a front and a rear, and this model has {units} blocks; write every-{self.n}")
        return delta_dit(self.n, min(PAPER, units // 2), self.early)


@validate_call
def delta_dit(n: PositiveInt, blocks: PositiveInt | None = None, early: Share = 0.5) -> Preset:
    """Reuse the residual of the last blocks in the early steps, and that of the first blocks later (Delta-DiT, arXiv 2406.01125).

    Needs the number of steps, ``model.cachekit.session(steps=...)``, or a known range of t; stats say where it was off.
    On other segments it is ``every(n)``.

    Args:
        n: period of what is reused.
        blocks: how many at either end; it must fit twice. None is half of the blocks of the model that is wrapped, and at most
            14, half of the 28 of the paper's models. ``wrap`` raises ``ConfigError`` where there are fewer than two.
        early: share of the steps in which the last blocks are reused. The paper tunes it for each model; half is ours.
    """
    if blocks is None:
        return _Half(n, early)
    advice = f"write fewer at either end, or delta-dit-{n} for half of them, instead of delta-dit-{n}-{blocks}"
    rear = Segment(-blocks, None, policy=every(n) | stage(early, late=True), advice=advice)
    front = Segment(0, blocks, policy=every(n) | stage(early), advice=advice)
    return Preset(every(n), segments=[front, rear], reuse="residual")
