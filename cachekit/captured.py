"""What early blocks returned, for as long as late blocks may ask for it. Copies and pickles of it start empty."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Captured:
    """What a block returned, the very tensor, and whether somebody wrote into it since.

    A model that is compiled as a whole doesn't tell: within a graph neither versions nor values can be asked for.

    Args:
        tensor: what it returned.
        compare: keep a copy to compare with where torch counts no versions, that is under ``torch.inference_mode``.
    """

    def __init__(self, tensor: Tensor, compare: bool) -> None:
        self.tensor = tensor
        self._version: int | None = None
        self._copy: Tensor | None = None
        if torch.compiler.is_compiling():
            return
        if not tensor.is_inference():
            self._version = tensor._version
        elif compare:
            self._copy = tensor.clone()

    @property
    def written(self) -> bool:
        """Whether it is another value than the block returned."""
        if self._version is not None:
            return self._version != self.tensor._version
        return self._copy is not None and not torch.allclose(self._copy, self.tensor, rtol=0, atol=0, equal_nan=True)


class Calls(threading.local):
    """What early blocks returned in the model call that is under way in this thread.

    Attributes:
        captured: by the early block's path; None outside of a call.
        gradients: whether the call records them.
        compared: late blocks that were seen to get what the early one returned, which is compared only once.
    """

    def __init__(self) -> None:  # run by each thread
        self.captured: dict[str, Captured] | None = None
        self.gradients = False
        self.compared: set[str] = set()

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
