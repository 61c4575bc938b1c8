"""FasterCache's unconditional pass: the conditional one plus their difference, whose low and high frequencies are weighted."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Step

Close = Annotated[float, Field(ge=-1)]


@dataclass(frozen=True, config=STRICT)
class Frequencies:
    """ŷ = c + d_i, d_i = w_low L(d_(i-1)) + w_high (d_(i-1) - L(d_(i-1))) (FasterCache, arXiv 2410.19355, eq. 9 and 10).

    c is what the conditional pass returns at this step, d_0 the difference of the two passes at the last step where both ran, and
    L keeps what lies within a radius of the middle of the two-dimensional spectrum. The weights are above 1 within windows of t
    and multiply at each reused step, as in diffusers. The spectra are linear in the predictions, so that one real tensor is held
    in place of two complex ones. For segments="uncond" alone.

    Args:
        low, high: the weights within their windows; at 1 and 1 the difference is held as it is.
        low_start, low_close, high_start, high_close: of the windows, close < t < start, in the scheduler's units.
        divisor: the radius is the smaller of height and width, the prediction's last two axes, over this, rounded down.
    """

    low: NonNegativeFloat = 1.1
    high: NonNegativeFloat = 1.1
    _: KW_ONLY
    low_start: NonNegativeFloat = 901.0
    low_close: Close = 99.0
    high_start: NonNegativeFloat = 301.0
    high_close: Close = -1.0
    divisor: PositiveInt = 5

    def __post_init__(self) -> None:
        for name, start, close in (("low", self.low_start, self.low_close), ("high", self.high_start, self.high_close)):
            if close >= start:
                raise ConfigError(f"{name}_start={start:g}, {name}_close={close:g}: t falls, so that start is the larger one")

    @property
    def length(self) -> int:
        return 1

    @property
    def beta(self) -> float:
        return 1.0

    def time(self, step: Step) -> float:
        """The timestep."""
        return step.t

    def weights(self, times: object, t: float) -> list[float]:
        """The difference as it was carried up to now."""
        return [1.0]

    def carry(self, value: Tensor, step: Step) -> Tensor:
        """The difference at this step.

        Args:
            value: that of the step before, (batch, ..., height, width).
            step: this step.

        Raises:
            ConfigError: fewer than four axes, as where a model predicts tokens.
        """
        if self.low == self.high == 1.0:
            return value
        if value.ndim < 4:
            raise ConfigError(
                f"a prediction of shape {tuple(value.shape)} has no height and width to take frequencies along; "
                'give segments="uncond" the reuse Frequencies(1, 1) or "residual", which hold the difference of the passes'
            )
        low = self.low if self.low_close < step.t < self.low_start else 1.0
        high = self.high if self.high_close < step.t < self.high_start else 1.0
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        changed = wide * high if low == high else wide * high + self.lowpass(wide) * (low - high)
        return changed.to(value.dtype)

    def lowpass(self, value: Tensor) -> Tensor:
        """L: what lies within the radius, (..., height, width)."""
        height, width = value.shape[-2:]
        radius = min(height, width) // self.divisor
        # Of a real signal half of the spectrum is enough, since the disc is the same on both sides of the middle.
        rows = torch.fft.fftfreq(height, 1 / height, device=value.device).round()
        columns = torch.arange(width // 2 + 1, device=value.device)
        inside = rows[:, None] ** 2 + columns**2 <= radius**2
        low: Tensor = torch.fft.irfft2(torch.fft.rfft2(value) * inside, s=(height, width))
        return low
