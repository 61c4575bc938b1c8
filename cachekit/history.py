"""The values that a reuse weighs: the last few of one tensor, at their own times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import ConfigError
from cachekit.reuse import Reuse


def weights_of(reuse: Reuse, times: Sequence[float], t: float) -> list[float]:
    """What a reuse weighs its history with.

    Raises:
        ConfigError: not with finite numbers, at least one.
    """
    found = reuse.weights(times, t)
    weights = [] if found is None else [float(weight) for weight in found]
    if not weights or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"{reuse!r}.weights({list(times)}, {t}) returned {found!r}; return a finite number for each time, newest first"
        )
    return weights


def weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The sum of floating-point values with these weights, in their dtype, always a tensor of its own."""
    used = [(weight, value) for weight, value in zip(weights, values, strict=False) if weight != 0.0]
    if len(used) == 1 and used[0][0] == 1.0:
        return used[0][1].clone()
    # Weights of both signs cancel: in half precision each product's rounding would be of the size of the change.
    wide = torch.promote_types(values[0].dtype, torch.float32)
    if not used:
        return torch.zeros_like(values[0])
    total = used[0][1].to(wide) * used[0][0]
    for weight, value in used[1:]:
        total.add_(value, alpha=weight)
    return total.to(values[0].dtype)


@dataclass
class History:
    """The last few values of one tensor: (time on the forecast's axis, value), newest first."""

    entries: deque[tuple[float, Tensor]] = field(default_factory=deque)

    def push(self, t: float, value: Tensor, length: int) -> None:
        """Remember a value; one at the same time as the newest replaces it (a second evaluation, as in Heun's method)."""
        if self.entries and self.entries[0][0] == t:
            self.entries.popleft()
        self.entries.appendleft((t, value))
        while len(self.entries) > length:
            self.entries.pop()

    def value(self, t: float, reuse: Reuse) -> Tensor:
        """The forecast at t, always a tensor of its own: the model may write into it."""
        newest = self.entries[0][1]
        if not newest.is_floating_point():
            return newest.clone()
        return self.combined(weights_of(reuse, [time for time, _ in self.entries], t))

    def combined(self, weights: Sequence[float]) -> Tensor:
        """The weighted sum of the values, newest first, as a tensor of its own."""
        return weighted(weights, [value for _, value in self.entries])

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for _, value in self.entries)


def push(store: dict[Any, History], key: Any, t: float, value: Tensor) -> None:
    """Put one value alone into a store."""
    store[key] = History(deque([(t, value)]))
