"""Which tensors of a model call have the batch's rows: found by comparing it with the same call of one sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachekit.alone import Alone, MeasuredCall, SeenCall, Shown, shown
from cachekit.call import Given, PlainCall
from cachekit.sampled import Batched, Taken
from cachekit.samples import Part, Samples
from cachekit.tree import Path, arguments, replaced, tensors


class CannotSplit(Exception):
    """It can't be known how to run a part of this batch; the message says why."""


class Agreement:
    """Compares the two calls; whether their numbers agree is asked once, at the end."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.agree: dict[torch.device, list[Tensor]] = {}

    def calls(self, whole: list[SeenCall], alone: list[SeenCall]) -> tuple[tuple[Taken, Taken], ...]:
        """Of each of these calls, what its tensors are.

        Raises:
            CannotSplit: a sample alone makes the model do something else.
        """
        pairs = list(zip(whole, alone, strict=True))
        if any(a.plain != b.plain for a, b in pairs):
            raise CannotSplit("one sample alone gives blocks other numbers")
        return tuple((self.taken(a.arguments, b.arguments), self.taken(a.result, b.result)) for a, b in pairs)

    def taken(self, whole: dict[Path, Shown], alone: dict[Path, Shown]) -> Taken:
        """Which of these tensors have the batch's rows.

        Raises:
            CannotSplit: there are others, or some have neither as many rows nor rows for each item.
        """
        if list(whole) != list(alone):
            raise CannotSplit("one sample alone gives blocks other tensors")
        paths = {path for path in whole if self._has_rows(path, whole[path], alone[path])}
        return Taken({path: seen.shape for path, seen in whole.items()}, frozenset(paths))

    def _has_rows(self, path: Path, whole: Shown, alone: Shown) -> bool:
        if whole.shape == alone.shape:
            self._compare(whole.some, alone.some)
            return False
        if whole.of_one is None or whole.shape != (alone.shape[0] * self.samples.count, *alone.shape[1:]):
            raise CannotSplit(f"a tensor at {path} is {whole.shape} for the batch and {alone.shape} for one sample")
        self._compare(whole.of_one, alone.some)
        return True

    def _compare(self, a: Tensor, b: Tensor) -> None:
        equal = a == b
        if a.is_floating_point() and a.numel():
            # Kernels for batches of another size round otherwise, and blocks amplify it; other rows differ by their own size.
            difference, size = (a - b).abs(), torch.where(equal, 0, a).abs().amax()
            equal = equal | (difference <= size * torch.finfo(a.dtype).eps ** 0.5)
        self.agree.setdefault(a.device, []).append(equal.all())

    def settle(self) -> int:
        """Ask whether all agreed; returns how many devices had to be waited for.

        Raises:
            CannotSplit: some did not.
        """
        if not all(bool(torch.stack(flags).all()) for flags in self.agree.values()):
            raise CannotSplit("one sample alone computes something else than in the batch")
        return sum(device.type != "cpu" for device in self.agree)


def inputs_of(part: Part, given: Given) -> Given:
    """A model call's arguments for a part of the batch: of each tensor with one row an item, their rows."""
    rows = {path: part.take(t) for path, t in arguments(*given) if t.ndim and t.shape[0] == part.samples.rows}
    return with_rows(rows, given)


def with_rows(rows: dict[Path, Tensor], given: Given) -> Given:
    """Arguments with other tensors at some paths."""
    args, kwargs = given
    return replaced(args, rows), replaced(kwargs, rows)


def compared(part: Part, whole: PlainCall, alone: Alone, given: Given, results: tuple[Any, Any]) -> tuple[Batched, int]:
    """What two calls show; and how many devices had to be waited for.

    Args:
        part: the sample that ran alone.
        whole: the call of the batch. Where its blocks were not watched, they are no sites and are not compared.
        given: the model's arguments for the whole batch.
        results: what the model returned for the batch, and for one sample.

    Raises:
        CannotSplit: it can't be known how to run a part of the batch.
    """
    comparison = Agreement(part.samples)
    visits: tuple[tuple[Taken, Taken], ...] = ()
    modules: dict[tuple[int, int], tuple[Taken, Taken]] = {}
    if whole.blocks != alone.blocks:
        raise CannotSplit("one sample alone runs other blocks")
    if isinstance(whole, MeasuredCall):
        numbers = [(v, n, seen.name) for v, found in sorted(whole.module_watch.seen.items()) for n, seen in enumerate(found)]
        if alone.writing:
            raise CannotSplit(f"block {alone.writing[0]} writes into its arguments")
        if [name for _, _, name in numbers] != alone.called:
            raise CannotSplit("one sample alone runs other modules")
        visits = comparison.calls(whole.seen, alone.seen)
        taken = comparison.calls(whole.seen_modules, alone.seen_modules)
        modules = {(v, n): each for (v, n, _), each in zip(numbers, taken, strict=True)}
    returned = comparison.taken(shown(tensors(results[0]), part), shown(tensors(results[1]), None))
    found = arguments(*given)
    paths = frozenset(path for path, tensor in found if tensor.ndim and tensor.shape[0] == part.samples.rows)
    inputs = Taken({path: tuple(tensor.shape) for path, tensor in found}, paths)
    return Batched((inputs, returned), visits, modules), comparison.settle()
