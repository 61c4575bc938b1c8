"""Held values of which the tokens that need it most are computed anew: ToCa's and DuCa's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Step


@dataclass(frozen=True, config=STRICT)
class Tokens:
    """Hold the output, and recompute a share of an MLP's tokens on reused steps (ToCa, arXiv 2410.05317; DuCa, 2412.18911).

    Tokens of the highest score are taken, whose score is, of the tokens of one sample,

    - ``by="norm"``: the norm of what enters the MLP, over the norm of these numbers;
    - ``by="similarity"``: 1 - cosine of what enters the MLP with its stored output, over the norm of these numbers;
    - ``by="random"``: even in [0, 1), the same for all samples and all MLPs of a step (from ``seed`` and the step's index),

    plus ``age`` times the number of reused steps since the token was computed, over ``period``. These are the choices of ToCa's
    code that need no attention map, so that fused attention kernels stay in use. Its scores from attention maps, DuCa's from the
    norm of attention's values, and the bonus for each square of 2 x 2 tokens are not there.

    Elsewhere than in MLPs it holds: attention mixes tokens.

    Args:
        share: of the tokens, rounded down, but at least one.
        by: the score.
        age: weight of the age; 0.25 in ToCa's code.
        period: what ages are measured in.
        alternate: recompute no token on the first, third, ... reused step in a row (DuCa's aggressive steps).
        seed: of ``by="random"``. torch's generators are left alone.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    _: KW_ONLY
    by: Literal["norm", "similarity", "random"] = "norm"
    age: NonNegativeFloat = 0.25
    period: PositiveInt = 3
    alternate: bool = False
    seed: NonNegativeInt = 0

    @property
    def length(self) -> int:
        return 1

    @property
    def beta(self) -> float:
        return 0.0

    def time(self, step: Step) -> float:
        """The step's timestep."""
        return step.t

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """The newest value."""
        return [1.0]

    def choose(self, entering: Tensor, held: Tensor, ages: Tensor, step: Step, since: int) -> Tensor | None:
        """See ``cachekit.refresh.Refreshing``. Indices rise.

        Raises:
            ConfigError: similarity of what has different widths.
        """
        if self.alternate and since % 2 == 1:
            return None
        score = self._score(entering, held, step) + self.age / self.period * ages
        count = max(1, int(self.share * score.shape[1]))
        return score.topk(count, dim=1).indices.sort(dim=1).values

    def _score(self, entering: Tensor, held: Tensor, step: Step) -> Tensor:
        wide = torch.promote_types(entering.dtype, torch.float32)
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step.i)
            return torch.rand(1, entering.shape[1], generator=generator).to(entering.device).expand(len(entering), -1)
        if self.by == "norm":
            return functional.normalize(entering.to(wide).norm(dim=-1), dim=-1)
        if entering.shape != held.shape:
            raise ConfigError(
                f"tokens by similarity: an MLP takes width {entering.shape[-1]} and returns {held.shape[-1]}; write by='norm' or "
                "'random', or leave it out of the segment"
            )
        return functional.normalize(1 - functional.cosine_similarity(entering.to(wide), held.to(wide), dim=-1), dim=-1)
