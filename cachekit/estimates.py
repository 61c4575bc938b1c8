"""What a site's history says of the error of reusing it, without running the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from cachekit.history import History
from cachekit.reuse import Reuse


@runtime_checkable
class Embedded(Protocol):
    """A reuse that can say what it would forecast at another order."""

    def rival(self, times: Sequence[float], t: float) -> list[float] | None:
        """Weights of the forecast of the order below, or of the first where nothing but the newest value is used."""
        ...


class Error:
    """The relative error of several tensors taken together. Adding one waits for no device; reading does, once."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._read: tuple[float, float] | None = None

    def add(self, ours: Tensor, true: Tensor, of: Tensor | None = None) -> None:
        """One more tensor; integers and flags have no error.

        Args:
            ours, true: any shape; their difference is the error.
            of: what the error is relative to; ``true`` itself where it is None.
        """
        if not true.is_floating_point():
            return
        wide = torch.promote_types(true.dtype, torch.float32)
        off = torch.linalg.vector_norm(ours.detach().to(wide) - true.detach().to(wide))
        norm = torch.linalg.vector_norm((true if of is None else of).detach().to(wide))
        # Their squares are summed, which overflows in single precision first.
        self._parts.append(torch.stack((off, norm)).double())
        self._read = None

    def read(self, count: Callable[[Tensor], None] | None = None) -> tuple[float, float]:
        """Norm of all the differences, and norm of all that they are relative to.

        Args:
            count: told where a tensor is really read.
        """
        if self._read is None:
            if not self._parts:
                return 0.0, 0.0
            total = torch.linalg.vector_norm(torch.stack([part.to(self._parts[0].device) for part in self._parts]), dim=0)
            if count is not None:
                count(total)
            off, norm = total.tolist()
            self._read = off, norm
        return self._read

    @property
    def value(self) -> float:
        """The error; 0 where nothing differs, and infinite against nothing at all."""
        return ratio(*self.read())


def ratio(off: float, norm: float) -> float:
    """off / norm, with 0 / 0 = 0. What is no number stays none."""
    if norm == 0:
        return 0.0 if off == 0 else float("inf")
    return off / norm


@dataclass
class Miss:
    """What a forecast would have missed at a recompute of a site.

    Attributes:
        error: the forecast against what was computed, relative to the site's output, all its tensors together.
        gap: distance of the recompute from the newest stored value then, on the reuse's axis.
    """

    gap: float
    error: Error = field(default_factory=Error)

    def add(self, history: History, t: float, reuse: Reuse, kept: Tensor, output: Tensor) -> None:
        """One tensor of the site.

        Args:
            history: of what was stored before.
            t: time of the recompute on the reuse's axis.
            reuse: of the site.
            kept: what is stored now, output less beta times input.
            output: the tensor itself.
        """
        if kept.is_floating_point():
            self.error.add(history.value(t, reuse), kept, output)


def forecast_error(
    histories: Sequence[History], t: float, reuse: Reuse, miss: Miss | None, count: Callable[[Tensor], None]
) -> float:
    """Estimated error of reusing a site at t, relative to the norm of its output at the last recompute.

    The larger of two estimates. One is embedded: what the forecast differs by from that of one order less (for a reuse that
    knows orders). The other is what a forecast missed by at the last recompute, carried over to today's distance from the
    newest value: beyond that of then it grows as its (m+1)-th power, the order of the local error of a forecast from m + 1 values
    (``docs/error-budget.md``); within it it shrinks in proportion alone, since damped forecasts have no higher order.

    Args:
        histories: of each of the site's tensors.
        t: now, on the reuse's axis.
        reuse: of the site.
        miss: of the last recompute that had anything to forecast from.
        count: told of each tensor that is read.

    Returns:
        The estimate; infinite where nothing was missed yet, or at the newest value's own time.
    """
    times = [time for time, _ in histories[0].entries] if histories else []
    if miss is None or not times or t == times[0] or miss.gap == 0:
        return float("inf")
    weights = reuse.weights(times, t)
    closer = abs(t - times[0]) / miss.gap
    missed, size = miss.error.read(count)
    carried = ratio(missed, size) * max(closer, closer ** len(weights))
    rival = reuse.rival(times, t) if isinstance(reuse, Embedded) else None
    if rival is None:
        return carried
    embedded = Error()
    padded = [a - b for a, b in zip(_padded(weights, times), _padded(rival, times), strict=True)]
    for history in histories:
        if history.entries[0][1].is_floating_point():
            embedded.add(history.combined(padded), torch.zeros_like(history.entries[0][1]))
    # Either that is no number must not be lost in the larger of the two.
    found = (carried, ratio(embedded.read(count)[0], size))
    return max(found) if all(part == part for part in found) else float("inf")


def _padded(weights: list[float], times: Sequence[float]) -> list[float]:
    return weights[: len(times)] + [0.0] * (len(times) - len(weights))
