"""A history whose samples were computed at different times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cachekit.history import weighted, weights_of
from cachekit.reuse import Reuse
from cachekit.samples import Part, Samples


class SampleHistory:
    """The last few values of one tensor of a batch, for each sample its own.

    Attributes:
        times: of each sample, newest first.
        places: tensors of the whole batch; the first has each sample's newest value, and so on. Where a sample has no time
            for a place, its rows there mean nothing.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.times: list[list[float]] = [[] for _ in samples.all]
        self.places: list[Tensor] = []

    def push(self, t: float, value: Tensor, length: int, chosen: tuple[int, ...]) -> None:
        """Remember a value of the chosen samples; one at the same time as a sample's newest replaces it.

        Args:
            value: of the whole batch, a tensor of our own.
        """
        again = [g for g in chosen if self.times[g][:1] == [t]]
        onwards = [g for g in chosen if self.times[g][:1] != [t]]
        if len(onwards) == self.samples.count or not self.places:
            self.places = [value, *self.places]
        elif onwards:
            part = Part(self.samples, onwards)
            moved = [part.take(place) for place in (value, *self.places)]
            # A place that is new has no meaning for the others, whatever lies there.
            self.places = [part.put(place, rows) for place, rows in zip([*self.places, self.places[-1]], moved, strict=True)]
        if len(again) == self.samples.count:
            self.places[0] = value
        elif again:
            part = Part(self.samples, again)
            self.places[0] = part.put(self.places[0], part.take(value))
        for g in onwards:
            self.times[g] = [t, *self.times[g]][:length]
        del self.places[max(len(times) for times in self.times) :]

    def value(self, t: float, reuse: Reuse, chosen: tuple[int, ...]) -> Tensor:
        """The forecast at t of the chosen samples, always a tensor of its own; the others' rows are their newest values.

        Returns:
            A tensor of the whole batch.
        """
        newest = self.places[0]
        if not newest.is_floating_point():
            return newest.clone()
        weights = [
            tuple(weights_of(reuse, self.times[g], t))[: len(self.times[g])] if g in chosen else (1.0,) for g in self.samples.all
        ]
        if len({*weights}) == 1:
            return weighted(weights[0], self.places)
        return self._each(weights)

    def _each(self, weights: Sequence[Sequence[float]]) -> Tensor:
        """The sums with weights of each sample's own."""
        newest = self.places[0]
        wide = torch.promote_types(newest.dtype, torch.float32)
        total = torch.zeros_like(newest, dtype=wide)
        for j, place in enumerate(self.places):
            column = [own[j] if j < len(own) else 0.0 for own in weights]
            if any(column):
                factors = self.samples.column(column, place, wide)
                # What has no weight takes no part, even where it is infinite.
                total.add_(torch.where(factors == 0, 0.0, factors * place))
        return total.to(newest.dtype)

    @property
    def nbytes(self) -> int:
        return sum(place.numel() * place.element_size() for place in self.places)
