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

By = Literal["norm", "value", "similarity", "random"]
Share = Annotated[float, Field(gt=0, le=1)]
Slope = Annotated[float, Field(ge=-1, le=1)]
# Rows and columns of tokens.
Grid = tuple[PositiveInt, PositiveInt]


@dataclass(frozen=True, config=STRICT)
class Tokens:
    """Hold the output, and recompute a share of an MLP's tokens on reused steps (ToCa, arXiv 2410.05317; DuCa, 2412.18911).

    Tokens of the highest score are taken, whose score is, of the tokens of one sample,

    - ``by="norm"``: the norm of what enters the MLP, over the norm of these numbers;
    - ``by="value"``: the sum over heads of 1 - the norm of a token's value vector in self-attention, when that last ran in the
      block, over the norm of these numbers: the smallest norms (DuCa's ``kv-norm``);
    - ``by="similarity"``: 1 - cosine of what enters the MLP with its stored output, over the norm of these numbers;
    - ``by="random"``: even in [0, 1), the same for all samples and all MLPs of a step (from ``seed`` and the step's index),

    plus ``age`` times the number of reused steps since the token was computed, over ``period``; and then, where ``grid`` is
    given, the highest of each square of ``window`` x ``window`` tokens is raised by ``bonus`` times its absolute value. These
    are the choices of the authors' code that need no attention map, so that fused attention kernels, which give none, stay in
    use; its scores from attention maps are not there.

    Elsewhere than in MLPs it holds: attention mixes tokens.

    Args:
        share: of the tokens, rounded down, but at least one.
        by: the score.
        age: weight of the age; 0.25 in ToCa's code.
        period: what ages are measured in.
        alternate: recompute no token on the first, third, ... reused step in a row (DuCa's aggressive steps).
        seed: of ``by="random"``. torch's generators are left alone.
        slope: the share grows evenly over the generation, from 1 - ``slope`` times ``share`` at its start to 1 + ``slope`` times
            at its end (never above 1); a negative one lets it fall, 0 keeps it. How far the generation is, a session's number of
            steps says, or else t within its range; where neither is known, it is kept. ToCa's code for DiT has 0.4: its formula
            falls with the step's number, and its steps are numbered from the last to the first.
        grid: rows and columns of the tokens, row by row, or frame by frame of them; a sequence alone doesn't say how it lay.
        window, bonus: 2 and 0.6 in ToCa's code for DiT, 4 and 0.4 for PixArt. ToCa raises by ``bonus`` times the score itself,
            which would lower the negative ones that large values make.

    Raises:
        ConfigError: the window doesn't divide the grid.
    """

    share: Share
    _: KW_ONLY
    by: By = "norm"
    age: NonNegativeFloat = 0.25
    period: PositiveInt = 3
    alternate: bool = False
    seed: NonNegativeInt = 0
    slope: Slope = 0.0
    grid: Grid | None = None
    window: PositiveInt = 2
    bonus: NonNegativeFloat = 0.6

    def __post_init__(self) -> None:
        if self.grid is not None and any(side % self.window for side in self.grid):
            raise ConfigError(f"window={self.window} divides no grid={self.grid}; give one that divides rows and columns")

    @property
    def length(self) -> int:
        return 1

    @property
    def beta(self) -> float:
        return 0.0

    @property
    def measures(self) -> bool:
        return self.by == "value"

    def time(self, step: Step) -> float:
        """The step's timestep."""
        return step.t

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """The newest value."""
        return [1.0]

    def measure(self, values: Tensor) -> Tensor:
        """See ``cachekit.values.Measuring``."""
        wide = torch.promote_types(values.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=wide)
        return (1 - norms).sum(-1)

    def choose(
        self, entering: Tensor, held: Tensor, ages: Tensor, step: Step, since: int, measured: Tensor | None = None
    ) -> Tensor | None:
        """See ``cachekit.refresh.Refreshing``. Indices rise.

        Raises:
            ConfigError: similarity of what has different widths, or a grid that the tokens don't fill.
        """
        if self.alternate and since % 2 == 1:
            return None
        score = self._score(entering, held, step, measured) + self.age / self.period * ages
        score = score if self.grid is None else self._raised(score, self.grid)
        share = min(1.0, self.share * (1 + self.slope * (2 * _over(step) - 1)))
        count = max(1, int(share * score.shape[1]))
        return score.topk(count, dim=1).indices.sort(dim=1).values

    def _score(self, entering: Tensor, held: Tensor, step: Step, measured: Tensor | None) -> Tensor:
        wide = torch.promote_types(entering.dtype, torch.float32)
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step.i)
            return torch.rand(1, entering.shape[1], generator=generator).to(entering.device).expand(len(entering), -1)
        if self.by == "norm":
            return functional.normalize(entering.to(wide).norm(dim=-1), dim=-1)
        if self.by == "value":
            if measured is None:
                raise ConfigError("tokens by value: what measure() made of their value vectors must be handed to choose()")
            return functional.normalize(measured, dim=-1)
        if entering.shape != held.shape:
            raise ConfigError(
                f"tokens by similarity: an MLP takes width {entering.shape[-1]} and returns {held.shape[-1]}; write by='norm' or "
                "'random', or leave it out of the segment"
            )
        return functional.normalize(1 - functional.cosine_similarity(entering.to(wide), held.to(wide), dim=-1), dim=-1)

    def _raised(self, score: Tensor, grid: tuple[int, int]) -> Tensor:
        """The scores (batch, tokens), the highest of each window raised."""
        (rows, columns), k = grid, self.window
        if score.shape[1] % (rows * columns):
            raise ConfigError(
                f"grid={grid}: an MLP takes {score.shape[1]} tokens, which are no whole number of such grids; give their rows and "
                "columns, or leave the MLP out of the segment"
            )
        squares = torch.unflatten(score, 1, (-1, rows // k, k, columns // k, k)).transpose(3, 4).flatten(4)
        highest, place = squares.max(dim=-1, keepdim=True)
        squares = squares.scatter(-1, place, highest + self.bonus * highest.abs())
        return torch.unflatten(squares, -1, (k, k)).transpose(3, 4).flatten(1)


def _over(step: Step) -> float:
    """The share of the generation that is over, 0 to 1; a half where it is unknown."""
    if step.steps is not None:
        return min(1.0, (step.i + 1) / step.steps)
    return 0.5 if step.range is None else min(1.0, max(0.0, 1 - step.t / step.range))
