"""Find a block's main stream in one call of it: among its arguments, and in what it returned."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import ModelError
from cachekit.graph import signature
from cachekit.tree import Path, arguments, pick, replaced, tensors

Main = tuple[str, int] | None


def main_output(block: str, main: Main, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor:
    """The main stream in what a block returned: where the adapter says, else the only tensor shaped as its first argument.

    Raises:
        ModelError: there is none, or more than one tensor can be it.
    """
    if isinstance(result, Tensor):
        return result
    if main is not None and isinstance(result, tuple | list) and len(result) > main[1] and isinstance(result[main[1]], Tensor):
        chosen: Tensor = result[main[1]]
        return chosen
    outputs = [tensor for _, tensor in tensors(result)]
    for _, entering in arguments(args, kwargs):
        alike = [output for output in outputs if signature(output) == signature(entering)]
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ModelError(
                f"block {block!r} returns {len(alike)} tensors of shape {tuple(entering.shape)}; say which is the main stream: "
                "adapter=cachekit.Adapter(main=('argument name', place in the result))"
            )
    raise ModelError(f"block {block!r} returns no tensor of a shape that it takes in; give pairs= of blocks that carry a stream")


def main_input(
    forward: Callable[..., Any], main: Main, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Path, Tensor] | None:
    """Where a block's main stream stands among its arguments: where the adapter says, else the first tensor."""
    if main is not None:
        names = list(inspect.signature(forward).parameters)
        paths: list[Path] = [(main[0],), *([(names.index(main[0]),)] if main[0] in names else [])]
        for path in paths:
            found = pick(args, kwargs, path)
            if isinstance(found, Tensor):
                return path, found
    return next(iter(arguments(args, kwargs)), None)


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another tensor at this path. Every other container stays the object it is: blocks append to lists."""
    first, rest = path[0], path[1:]
    if isinstance(first, int):
        return (*args[:first], replaced(args[first], {rest: x}), *args[first + 1 :]), kwargs
    return args, {**kwargs, str(first): replaced(kwargs[str(first)], {rest: x})}


def swapped(skip: Tensor, like: Tensor) -> Tensor:
    """(batch * b, a, D) -> (batch * a, b, D), as a model goes from tokens over frames to frames of tokens.

    One whose shape says that it can't be laid out like ``like`` is returned as it is.
    """
    if skip.ndim != 3 or like.ndim != 3 or like.shape[0] % skip.shape[1] or skip.shape[0] % (like.shape[0] // skip.shape[1]):
        return skip
    batch = like.shape[0] // skip.shape[1]
    return torch.unflatten(skip, 0, (batch, -1)).transpose(1, 2).reshape(like.shape[0], -1, skip.shape[-1])
