"""Streams on their way through a reused stretch under inference mode, where nobody counts how often a tensor is written into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachekit.graph import Visit
from cachekit.layout import Action
from cachekit.tree import Path, pick, tensors


class Uncounted:
    """Copies of what comes to a stretch and of what enters it, to compare with what enters and what comes to its end.

    Attributes:
        waits: device synchronisations so far.
    """

    def __init__(self) -> None:
        self._left: dict[Path, Tensor] = {}
        self._entered: dict[tuple[int, Path], Tensor] = {}
        self.waits = 0

    def leaves(self, result: Any) -> None:
        """Note what a visit returned behind which a stretch begins."""
        self._left = {path: tensor.clone() for path, tensor in tensors(result) if tensor.is_inference()}

    def unchanged(self, v: int, visit: Visit, action: Action, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether nobody has written into a stretch's streams so far; asked at each of its reused visits."""
        at = {out: path for path, out in visit.streams}
        if v == action.run:
            entering = {path: pick(args, kwargs, path) for path in at.values()}
            self._entered |= {(v, path): tensor.clone() for path, tensor in entering.items() if tensor.is_inference()}
            known = [(self._left.get(output), path) for path, output in visit.links] if visit.linked == "same" else []
        else:
            known = [(self._entered.get((action.run, entry)), at[out]) for out, entry in action.entry if out in at]
        pairs = [(before, pick(args, kwargs, path)) for before, path in known if before is not None]
        self.waits += sum(before.device.type != "cpu" for before, _ in pairs)
        return all(torch.equal(before, now) for before, now in pairs)
