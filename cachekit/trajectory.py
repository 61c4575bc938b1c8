"""Tell one sampling trajectory from another by its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The sine of the angle between two samples. Independent noise stands at 1 (a right angle); the steps of one trajectory, at
# the coarsest schedules that caching serves, stay well under half a right angle.
UNLIKE = 0.87
# The first sample again, scaled perhaps by the sampler, is parallel to itself up to the rounding of float32, in which sines are
# computed. A fine schedule's first steps turn it by a few 1e-5 and more.
PARALLEL = 1e-6

# Numbers in a row of the batch from which its own angle tells as much as the whole sample's.
LONG = 256

AGAIN = "the first sample again, at another timestep"


class Comparer:
    """Compares tensors by their values, and counts how often that made it wait for a device."""

    def __init__(self) -> None:
        self.waits = 0

    def equal(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors hold the same numbers; free where they are the same object."""
        if a is b:
            return True
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        self.waits += a.device.type != "cpu"
        return bool(torch.equal(a, b))

    def sines(self, sample: Tensor, first: Tensor, last: Tensor) -> tuple[float, float, float]:
        """The sines of a sample's angles to the first one and to the last one, and of its row that turned most since the last one.

        Over 1 where they point away from each other.
        """
        x, y = sample.detach().float(), last.float()
        apart = [_sines(x.reshape(1, -1), first.float().reshape(1, -1)), _sines(x.reshape(1, -1), y.reshape(1, -1))]
        rows = sample.size(0) if sample.ndim > 1 and sample.numel() >= LONG * sample.size(0) else 1
        if rows > 1:
            apart.append(_sines(x.reshape(rows, -1), y.reshape(rows, -1)).amax(0, keepdim=True))
        self.waits += sample.device.type != "cpu"
        whole, since, *most = torch.cat(apart).tolist()
        return whole, since, max(since, *most) if most else since


def _sines(x: Tensor, y: Tensor) -> Tensor:
    """Of the angle between each row of the two; a row that is the same, all zeros perhaps, has not turned."""
    along = (x * y).sum(-1) / (y * y).sum(-1)
    turned = torch.linalg.vector_norm(x - along[:, None] * y, dim=-1) / torch.linalg.vector_norm(x, dim=-1)
    return torch.where((x == y).all(-1), 0.0, torch.where(along > 0, turned, 2.0))


@dataclass(frozen=True)
class Trace:
    """The first and the last sample of a branch, as copies: samplers may write into theirs.

    Attributes:
        first, last: the copies.
        object, version: the last sample itself and how often it had been written into, to know it again at no cost.
    """

    first: Tensor
    last: Tensor
    object: Tensor
    version: int | None

    @classmethod
    def start(cls, sample: Tensor) -> Trace:
        """A trace of one sample."""
        copy = sample.detach().clone()
        return cls(copy, copy, sample, version(sample))

    def advance(self, sample: Tensor) -> Trace:
        """The trace with one sample more."""
        return Trace(self.first, sample.detach().clone(), sample, version(sample))

    def ends_in(self, sample: Tensor | None) -> bool:
        """Whether this is the last sample itself."""
        return sample is self.object and self.version is not None and self.version == version(self.object)

    def ends_at(self, sample: Tensor, comparer: Comparer) -> bool:
        """Whether this is the last sample, the same object or an equal one."""
        return self.ends_in(sample) or comparer.equal(self.last, sample)

    def follows(self, sample: Tensor, comparer: Comparer) -> str | None:
        """None where the sample can be this trajectory's next one, else what speaks against it."""
        if not sample.is_floating_point():
            return None
        first, last, most = comparer.sines(sample, self.first, self.last)
        # Scaled and rounded in half precision it comes out further off; then only a sample that has moved on since can tell.
        rounding = torch.finfo(sample.dtype).eps
        if first < PARALLEL or first < rounding < last / 2:
            return AGAIN
        # A row that holds another sample now (particles that were drawn again): what is stored for it is the one before's.
        if most > UNLIKE:
            return "a sample unlike the one before"
        return None


def version(tensor: Tensor) -> int | None:
    """How often a tensor has been written into; None under inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version
