"""What early blocks returned, for as long as late blocks may ask for it. Copies and pickles of it start empty."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Calls(threading.local):
    """What early blocks returned in the model call that is under way in this thread."""

    def __init__(self) -> None:  # run by each thread
        self.captured: dict[str, Tensor] | None = None
        self.gradients = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()


class Passed:
    """Which long skip went with which stream while gradients were recorded, so that a checkpointed block can run again.

    Held as long as the stream, which is as long as autograd holds both.
    """

    def __init__(self) -> None:
        self._skips: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._skips)

    def note(self, stream: Tensor, skip: Tensor) -> None:
        """Remember what went with a stream; the stream itself (behind the middle of a stack) must not keep itself alive."""
        self._skips[stream] = None if skip is stream else skip

    def find(self, stream: Tensor) -> Tensor | None:
        """What went with a stream."""
        if stream not in self._skips:
            return None
        skip: Tensor | None = self._skips[stream]
        return stream if skip is None else skip

    def __reduce__(self) -> tuple[Any, ...]:
        return Passed, ()
