"""Threads that take turns as drawn, so that whatever goes wrong between them can be replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any, TypeVar

from stacks import Stack, blocks_of

T = TypeVar("T")
# Only a deadlock lasts longer.
PATIENCE = 300.0


class Turns:
    """One thread runs at a time, and hands on where it pauses.

    Args:
        choices: who is next, counted among those that are still running; over and over.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = cycle(choices)
        self._condition = threading.Condition()
        self._running: list[int] = []
        self._turn = -1
        self._me = threading.local()
        self._started = threading.Barrier(1)

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run each job in a thread of its own; returns what they return, or raises what the first of them raised."""
        self._running = list(range(len(jobs)))
        self._turn = self._next()
        # A pool gives a thread that is done early the next job, and two jobs in one thread are no concurrency.
        self._started = threading.Barrier(len(jobs))
        with ThreadPoolExecutor(len(jobs)) as pool:
            futures = [pool.submit(self._job, k, job) for k, job in enumerate(jobs)]
        return [future.result() for future in futures]

    def pause(self, *_: Any) -> None:
        """Hand on, and wait for the next turn. Does nothing in a thread that is no job. Fits as a hook of a module."""
        me = getattr(self._me, "index", None)
        if me is not None:
            with self._condition:
                self._turn = self._next()
                self._condition.notify_all()
                self._wait(me)

    def pause_in_blocks(self, model: Stack) -> Stack:
        """Pause before each of a model's blocks too, not only between its steps."""
        for block in blocks_of(model):
            block.register_forward_pre_hook(self.pause)
        return model

    def _job(self, k: int, job: Callable[[], T]) -> T:
        self._me.index = k
        self._started.wait(PATIENCE)
        with self._condition:
            self._wait(k)
        try:
            return job()
        finally:
            with self._condition:
                self._running.remove(k)
                self._turn = self._next()
                self._condition.notify_all()

    def _next(self) -> int:
        return self._running[next(self._choices) % len(self._running)] if self._running else -1

    def _wait(self, k: int) -> None:
        if not self._condition.wait_for(lambda: self._turn == k, PATIENCE):
            raise TimeoutError(f"thread {k} was never let on again")
