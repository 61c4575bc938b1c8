"""Model calls that are noted: one of a whole batch, and one of a single sample of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachekit.call import Original, PlainCall
from cachekit.samples import Part
from cachekit.tree import Path, arguments, tensors, walk
from cachekit.watched import WatchedCall

# So many elements of a tensor tell its rows from any others.
MOST_COMPARED = 4096


@dataclass(frozen=True)
class Shown:
    """Some of a tensor's elements, and as many of the tried sample's rows (None: it has no rows for each item)."""

    shape: tuple[int, ...]
    some: Tensor
    of_one: Tensor | None


@dataclass(frozen=True)
class SeenCall:
    """A call as it was seen: tensors and plain values of the arguments, tensors of the result."""

    arguments: dict[Path, Shown]
    plain: dict[Path, str]
    result: dict[Path, Shown]


def _some(tensor: Tensor) -> Tensor:
    flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).detach().flatten()
    return flat[:: max(1, flat.numel() // MOST_COMPARED)].clone()


def shown(found: list[tuple[Path, Tensor]], part: Part | None) -> dict[Path, Shown]:
    """Note tensors; with a part of the batch, its rows too."""

    def show(tensor: Tensor) -> Shown:
        of_one = _some(part.take(tensor.detach())) if part is not None and part.samples.divide(tensor) else None
        return Shown(tuple(tensor.shape), _some(tensor), of_one)

    return {path: show(tensor) for path, tensor in found}


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Path, str]:
    leaves = [*walk(args), *walk(kwargs)]
    return {path: repr(leaf) for path, leaf in leaves if isinstance(leaf, bool | int | float | str)}


def _seen(part: Part | None, seen: list[SeenCall], original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a call and note it. What its arguments hold is noted before, since it may be written into."""
    before = shown(arguments(args, kwargs), part)
    plain = _plain(args, kwargs)
    result = original(*args, **kwargs)
    seen.append(SeenCall(before, plain, shown(tensors(result), part)))
    return result


class MeasuredCall(WatchedCall):
    """The first call of a branch, noted, so that a sample of it can be compared when it runs alone."""

    def __init__(self, *given: Any, part: Part) -> None:
        super().__init__(*given)
        self.part, self.seen, self.seen_modules = part, list[SeenCall](), list[SeenCall]()

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block, watch it and note it."""
        return super().visit(block, functools.partial(_seen, self.part, self.seen, original), args, kwargs)

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module, watch it and note it."""
        return super().module(name, Noted(self.part, self.seen_modules, original), args, kwargs)


class Noted:
    """A module's forward that notes its calls. What it looks like from outside is the forward's."""

    def __init__(self, part: Part | None, seen: list[SeenCall], original: Original) -> None:
        functools.update_wrapper(self, original)
        self._note = functools.partial(_seen, part, seen, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(*args, **kwargs)


class Alone(PlainCall):
    """The same call with one sample of the batch.

    Attributes:
        called: names of the modules that were called.
        writing: blocks that write into their arguments. What they write into a part of a batch would be lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []
        self.writing: list[str] = []
        self.seen, self.seen_modules = list[SeenCall](), list[SeenCall]()

    def visit(self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block and note it."""
        given = [(path, t, t.clone() if t.is_inference() else t._version) for path, t in arguments(args, kwargs)]
        result = super().visit(block, functools.partial(_seen, None, self.seen, original), args, kwargs)
        if [path for path, _ in arguments(args, kwargs)] != [path for path, _, _ in given] or any(
            not torch.equal(t, then) if isinstance(then, Tensor) else t._version != then for _, t, then in given
        ):
            self.writing.append(block)
        return result

    def module(self, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module and note it. Those that write into their arguments are no sites."""
        self.called.append(name)
        return super().module(name, functools.partial(_seen, None, self.seen_modules, original), args, kwargs)
