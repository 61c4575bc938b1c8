"""Look into a block before it runs: run it up to its attention, take what enters there, and stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cachekit.containers import Containers
from cachekit.main_stream import with_input
from cachekit.tree import Path, arguments, pick

Original = Callable[..., Any]


class _Reached(BaseException):
    """The module was reached. No block's ``except Exception`` may swallow it."""

    def __init__(self, entering: Tensor | None) -> None:
        super().__init__()
        self.entering = entering


class _Local(threading.local):
    peeking = False


class Peeker:
    """Looks into blocks, for one wrapped model.

    Args:
        eager: (path, original) -> what to call for a block's own code, where ``original`` is compiled code.
        note: what is told that a block could not be looked into.
    """

    def __init__(self, eager: Callable[[str, Original], Original], note: Callable[[str], None]) -> None:
        self._eager, self._note = eager, note
        self._local = _Local()

    @property
    def peeking(self) -> bool:
        """Whether a look is under way in this thread."""
        return self._local.peeking

    def reached(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that ends a look is called: does nothing unless one is under way in this thread."""
        if self._local.peeking:
            entering = next((tensor for _, tensor in arguments(args, kwargs)), None)
            raise _Reached(None if entering is None else entering.detach().clone())

    def peek(
        self, block: str, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Sequence[Path] | None
    ) -> Tensor | None:
        """What enters the block's attention if it is called so; None, with a note, where the block doesn't get there.

        The block gets copies of these arguments (all tensors where they are None), since it may write into its input. What it
        changes in lists and dictionaries is undone.
        """
        before = Containers(args, kwargs)
        paths = [path for path, _ in arguments(args, kwargs)] if streams is None else streams
        for path in paths:
            args, kwargs = with_input(args, kwargs, path, pick(args, kwargs, path).clone())
        self._local.peeking = True
        try:
            self._eager(block, original)(*args, **kwargs)
        except _Reached as found:
            if found.entering is not None:
                return found.entering
        finally:
            self._local.peeking = False
            before.restore()
        self._note(
            f"what enters the attention of block {block!r} could not be seen, so that every step was recomputed; say what the "
            "module is called: adapter=cachekit.Adapter(modulated=('name within the block',))"
        )
        return None


class Looking(Protocol):
    """What the interceptor of a module inside a block calls."""

    peeker: Peeker


def intercept_look(engine: Looking, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of the forward of a module at which a look into a block ends."""
    if not torch.compiler.is_compiling():
        engine.peeker.reached(args, kwargs)
    return original(*args, **kwargs)
