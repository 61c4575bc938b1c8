"""Tensors inside nested arguments and results, addressed by path."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Key = int | str
Path = tuple[Key, ...]

# In this order: an abstract class's instance check is ten times slower, and this runs for every block of every step.
_INDEXED = (tuple, list, dict, Mapping)


def children(value: Any) -> list[tuple[Key, Any]] | None:
    """The (key, item) pairs of a container, or None for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf (what is no tuple, list, mapping or dataclass) with its path, in order."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items = children(value)
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from walk(item, (*path, key))


def tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """The tensor leaves of a nested value with their paths, in order."""
    if isinstance(value, Tensor):
        return [((), value)]
    return [(path, leaf) for path, leaf in walk(value) if isinstance(leaf, Tensor)]


def arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Path, Tensor]]:
    """The tensor leaves of a call: paths start with a position or a keyword."""
    return tensors(args) + tensors(kwargs)


def pick(args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path) -> Any:
    """What stands at an argument path, or None where the call has nothing there."""
    try:
        return get(args if isinstance(path[0], int) else kwargs, path)
    except (KeyError, IndexError, AttributeError):
        return None


def get(value: Any, path: Path) -> Any:
    """What stands at a path of a result; the empty path is the result itself."""
    for key in path:
        holder: Any = value
        value = holder[key] if isinstance(value, _INDEXED) else getattr(value, str(key))
    return value


def replaced(value: Any, new: Mapping[Path, Any], path: Path = ()) -> Any:
    """A copy of a nested value with other leaves at the given paths; containers keep their types.

    Lists and dictionaries with nothing in them are copied too: models put things into those that they are given or get back.
    """
    if path in new:
        return new[path]
    items = None if isinstance(value, Tensor) else children(value)
    if items is None or not (items or isinstance(value, list | dict)):
        return value
    changed = {key: replaced(item, new, (*path, key)) for key, item in items}
    if isinstance(value, Mapping):
        result: Any = copy.copy(value)
        for key, item in changed.items():
            result[key] = item
        return result
    if isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            return type(value)(*changed.values())
        return type(value)(changed.values())
    return dataclasses.replace(value, **{str(key): item for key, item in changed.items()})


def without_tensors(value: Any) -> Any:
    """The structure of a result alone, so that keeping it keeps no memory."""
    return replaced(value, {path: None for path, _ in tensors(value)})
