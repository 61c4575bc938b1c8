"""The samples of a batch: which rows of a tensor are whose, and how much each one's have changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """How a batch is made up: item ``p * count + g`` is pass p of sample g, as pipelines that batch their guidance have it.

    Tensors may have several rows an item, one behind the other (a video model's frames).

    Attributes:
        count: number of samples, each of which is decided on by itself.
        passes: number of items of each sample.
        each: rows of an item in the model's own arguments and result: more than one where an item is itself a batch.
    """

    count: int
    passes: int = 1
    each: int = 1

    @property
    def batch(self) -> int:
        """Number of items."""
        return self.count * self.passes

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        return self.batch * self.each

    @property
    def all(self) -> tuple[int, ...]:
        """Every sample."""
        return tuple(range(self.count))

    def divide(self, tensor: Tensor) -> bool:
        """Whether a tensor has as many rows for each item."""
        return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % self.batch == 0

    def column(self, values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
        """One value for each sample, as a column that multiplies the rows of a tensor: (rows, 1, ..., 1)."""
        items = torch.tensor(values, dtype=dtype, device=like.device).repeat(self.passes)
        return items.repeat_interleave(like.shape[0] // self.batch).reshape(-1, *(1,) * (like.ndim - 1))

    def arranged(self, tensor: Tensor, pooled: bool) -> Tensor:
        """The numbers of each sample.

        Args:
            tensor: (rows, ...).
            pooled: of all its items together, instead of each.

        Returns:
            (count, passes or 1, everything else); (1, 1, everything) where the rows can't be told apart.
        """
        if not self.divide(tensor):
            return tensor.reshape(1, 1, -1)
        by_item = tensor.reshape(self.passes, self.count, -1).movedim(1, 0)
        return by_item.reshape(self.count, 1, -1) if pooled else by_item


class Part:
    """Some of the samples: takes their rows out of tensors, and puts them back."""

    def __init__(self, samples: Samples, chosen: Iterable[int]) -> None:
        self.samples, self.chosen = samples, tuple(chosen)
        self._items = sorted(p * samples.count + g for p in range(samples.passes) for g in self.chosen)
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def share(self) -> float:
        """Their share of the batch."""
        return len(self.chosen) / self.samples.count

    def rows(self, tensor: Tensor) -> Tensor:
        """The indices of their rows in a tensor of the whole batch."""
        each = tensor.shape[0] // self.samples.batch
        if (each, tensor.device) not in self._index:
            index = torch.tensor([item * each + row for item in self._items for row in range(each)])
            self._index[each, tensor.device] = index.to(tensor.device)
        return self._index[each, tensor.device]

    def take(self, tensor: Tensor) -> Tensor:
        """Their rows, in the order of the batch, as a tensor of its own."""
        return tensor.index_select(0, self.rows(tensor))

    def put(self, into: Tensor, rows: Tensor) -> Tensor:
        """A copy of a tensor of the whole batch with these in the place of their rows."""
        return into.index_copy(0, self.rows(into), rows)
