"""What conditions a branch: tensors that are known again by their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cachekit.trajectory import Comparer, version
from cachekit.tree import Path


@dataclass(frozen=True)
class Condition:
    """One tensor that conditions a branch.

    Attributes:
        values: a copy: loops write another prompt, or the next step's, into the tensor that they pass.
        object, version: the tensor itself and how often it had been written into, to know it again at no cost.
    """

    values: Tensor
    object: Tensor
    version: int | None

    def holds(self, tensor: Tensor, comparer: Comparer) -> bool:
        """Whether this is the tensor or one with its values. A write under inference mode leaves no trace, and is not seen."""
        return (tensor is self.object and self.version == version(tensor)) or comparer.equal(self.values, tensor)


def conditions(found: Sequence[tuple[Path, Tensor]], before: Sequence[Condition] = ()) -> tuple[Condition, ...]:
    """Those of one call; ``before`` are the same branch's at its last call, if they hold the same values."""
    copies = [condition.values for condition in before] or [tensor.detach().clone() for _, tensor in found]
    return tuple(Condition(copy, tensor, version(tensor)) for copy, (_, tensor) in zip(copies, found, strict=True))
