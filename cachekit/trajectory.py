"""Tell one sampling trajectory from another by its samples."""

from __future__ import annotations

import math
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

# Of the tokens of a discrete sample. Independent ones share hardly any, steps of one trajectory most of them.
REPLACED = 0.5

OTHER = "a sample unlike the one before"
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
        x, y, z = _numbers(sample.detach()), _numbers(last), _numbers(first)
        along = torch.dot(x, z) / torch.dot(z, z)
        whole = torch.where(along > 0, torch.linalg.vector_norm(x - along * z) / torch.linalg.vector_norm(x), 2.0)
        rows = sample.size(0) if sample.ndim > 1 and x.numel() >= LONG * sample.size(0) > 0 else 1
        a, b = x.view(rows, -1), y.view(rows, -1)
        products = [torch.linalg.vecdot(a, a), torch.linalg.vecdot(a, b), torch.linalg.vecdot(b, b)]
        self.waits += sample.device.type != "cpu"
        turned, *numbers = torch.cat([whole[None], *products]).tolist()
        of_rows = [numbers[k::rows] for k in range(rows)]
        since = _sine(*map(sum, zip(*of_rows, strict=True)))
        return turned, since, max(since, *(_sine(*own) for own in of_rows))

    def differing(self, a: Tensor, b: Tensor) -> float:
        """The share of elements that are not the same."""
        self.waits += a.device.type != "cpu"
        return float((a != b).float().mean()) if a.numel() else 0.0


def _numbers(sample: Tensor) -> Tensor:
    """As a row of real numbers in single precision."""
    return (torch.view_as_real(sample) if sample.is_complex() else sample).flatten().float()


def _sine(xx: float, xy: float, yy: float) -> float:
    """Of the angle between two vectors, from their products, to some 1e-3; of none at all where both are zero."""
    if xx == yy == 0.0:
        return 0.0
    return math.sqrt(max(0.0, 1 - xy * xy / (xx * yy))) if xy > 0 and math.isfinite(xx * yy) else 2.0


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
        if _is_discrete(sample):
            return self._follows_discrete(sample, comparer)
        first, last, most = comparer.sines(sample, self.first, self.last)
        # Scaled and rounded in half precision it comes out further off; then only a sample that has moved on since can tell.
        rounding = torch.finfo(sample.dtype).eps
        if first < PARALLEL or first < rounding < last / 2:
            return AGAIN
        # A row that holds another sample now (particles that were drawn again): what is stored for it is the one before's.
        return OTHER if most > UNLIKE else None

    def _follows_discrete(self, sample: Tensor, comparer: Comparer) -> str | None:
        if not comparer.equal(self.last, sample) and comparer.equal(self.first, sample):
            return AGAIN
        return OTHER if comparer.differing(self.last, sample) > REPLACED else None

    def turned(self, sample: Tensor, comparer: Comparer) -> float:
        """How far a sample is from the last one: the sine of their angle, or the share of tokens that are others."""
        if _is_discrete(sample):
            return comparer.differing(self.last, sample)
        return comparer.sines(sample, self.first, self.last)[2]


def _is_discrete(sample: Tensor) -> bool:
    """Whether it holds tokens, of which there is no angle."""
    return not (sample.is_floating_point() or sample.is_complex())


def version(tensor: Tensor) -> int | None:
    """How often a tensor has been written into; None under inference mode, where nobody counts."""
    return None if tensor.is_inference() else tensor._version
