"""What is under way in a thread: which call of the model, and in which of its blocks and modules."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from cachekit.call import Given, Original, PlainCall


class UnderWay(threading.local):
    """One for each thread (a model call never awaits, so that tasks need none of their own).

    Attributes:
        call: what the blocks of the model's call go through; None outside of one.
        block, module: where that is, if anywhere.
    """

    call: PlainCall | None = None
    block: str | None = None
    module: str | None = None

    def run(self, call: PlainCall, given: Given, original: Original) -> Any:
        """Call the model, its blocks going through ``call``."""
        self.call = call
        args, kwargs = given
        try:
            return original(*args, **kwargs)
        finally:
            self.call = None

    def run_block(self, path: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A hook that hides what it lies on makes attach() put a second interceptor over it: the first one then has no say.
        if self.call is None or self.block == path:
            return original(*args, **kwargs)
        self.block = path
        try:
            return self.call.visit(path, original, args, kwargs)
        finally:
            self.block = None

    def run_module(self, block: str, name: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # One that lies in another, or in several blocks, is its own block's, and once.
        if self.call is None or self.block != block or self.module is not None:
            return original(*args, **kwargs)
        self.module = name
        try:
            return self.call.module(name, original, args, kwargs)
        finally:
            self.module = None

    def show(self, block: str, name: str, values: Tensor | None) -> None:
        """Value vectors were made within a module of a block."""
        if self.call is not None and (self.block, self.module) == (block, name) and values is not None:
            self.call.show(values)
