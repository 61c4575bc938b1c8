"""Who a call belongs to: a lane for each running thread or asyncio task."""

from __future__ import annotations

import threading
import weakref
from asyncio import current_task
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cachekit.branch import Name
from cachekit.errors import ConfigError
from cachekit.lane import Lane
from cachekit.session import Generation

TURNS = (
    "two {what} took turns in one thread, and the steps of one were taken for the other's; sample one after the other, or each in "
    "a thread or an asyncio task of its own"
)


class Lanes:
    """The lanes of one wrapped model. They end with the thread or task that they are of.

    Args:
        hold: told how many bytes all of them hold together, whenever that may have changed; never from two threads at once.
    """

    def __init__(self, hold: Callable[[int], None]) -> None:
        self._hold = hold
        self._lock = threading.Lock()
        self._of: weakref.WeakKeyDictionary[Any, Lane] = weakref.WeakKeyDictionary()

    @property
    def current(self) -> Lane:
        """The lane of the asyncio task, or else of the thread, that asks."""
        try:
            owner: Any = current_task() or threading.current_thread()
        except RuntimeError:
            owner = threading.current_thread()
        with self._lock:
            return self._of.setdefault(owner, Lane())

    def reset(self) -> None:
        """Forget what every generation has stored, in whatever lane; explicit ones go on with nothing in them."""
        with self._lock:
            for lane in self._of.values():
                lane.generation, lane.nbytes = lane.generation and lane.generation.emptied(), 0
            self._hold(0)

    def empty(self, lane: Lane, missed: int = 0) -> None:
        """Forget a lane's generation; an explicit one goes on with nothing in it, after so many steps that it doesn't know of."""
        lane.generation = lane.generation and lane.generation.emptied(missed)
        self.count_bytes(lane)

    def count_bytes(self, lane: Lane) -> None:
        """Note what a lane holds now."""
        generation = lane.generation
        lane.nbytes = 0 if generation is None else sum(branch.nbytes for branch in generation.branches)
        with self._lock:
            # Each lane's own thread sums up its stores, which it alone changes.
            self._hold(sum(other.nbytes for other in self._of.values()))

    @contextmanager
    def named(self, name: Name) -> Iterator[None]:
        """Calls within belong to the branch of this name.

        Raises:
            ConfigError: at the end, where another name that was given within goes on.
        """
        names = self.current.names
        names.append(name)
        try:
            yield
        finally:
            in_turn = names[-1] is name
            # The last one that is this very object: names that are equal may be of another loop.
            del names[max(k for k, other in enumerate(names) if other is name)]
        if not in_turn:
            raise ConfigError(TURNS.format(what="branches"))

    @contextmanager
    def within(self, generation: Generation) -> Iterator[None]:
        """Calls within belong to this generation, and nothing of it is left afterwards.

        Raises:
            ConfigError: at the end, where another session that was opened within goes on: whose steps were whose can't be told.
        """
        lane = self.current
        opened = lane.open(generation)
        try:
            yield
        finally:
            in_turn = lane.close(opened)
            self.count_bytes(lane)
        if not in_turn:
            raise ConfigError(TURNS.format(what="sessions"))

    @contextmanager
    def disabled(self, aside: bool = False) -> Iterator[None]:
        """Calls within run as if the model were not wrapped; with ``aside`` they are no steps that a generation misses."""
        lane = self.current
        lane.disabled, lane.aside = lane.disabled + 1, lane.aside + aside
        try:
            yield
        finally:
            lane.disabled, lane.aside = lane.disabled - 1, lane.aside - aside
