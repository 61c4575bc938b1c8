"""Lists and dictionaries among the arguments of a call, as they were before it: models put things in and take them out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any


class Containers:
    """What stands in each list and dictionary of a call's arguments, in nested ones and in tuples.

    Args:
        args, kwargs: before the call.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before = [(container, copy.copy(container)) for container in _within((args, kwargs))]

    def changed(self) -> bool:
        """Whether one has other items now."""
        return any(_differ(now, before) for now, before in self._before)

    def restore(self) -> None:
        """Put in what was in there."""
        for container, before in self._before:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)


def _within(value: Any) -> Iterator[Any]:
    if type(value) in (list, dict):
        yield value
    if type(value) in (list, dict, tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _within(item)


def _differ(now: Any, before: Any) -> bool:
    if isinstance(now, dict):
        return list(now) != list(before) or any(now[key] is not before[key] for key in now)
    return len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))
