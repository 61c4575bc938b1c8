"""What policies look at while a model runs: one tensor that a call shows, compared with what it was before.

Every signal is such a pair. They differ in what is looked at, and in when what it is compared with was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cachekit.errors import ConfigError
from cachekit.samples import Samples

Of = Literal["probe", "front", "middle", "modulated", "check", "sample", "prediction"]
Since = Literal["recompute", "step"]

# What looks at the blocks before the segment, and can't be without them.
PROBES = frozenset({"probe", "front"})
# What looks at blocks around the segment or in it, and what looks into the stack, of which the whole prediction has neither.
BLOCKS = PROBES | {"check", "middle"}
INSIDE = BLOCKS | {"modulated"}

NO_PROBE = (
    "change() watches the block before the segment, and there is none here; leave the first block out, "
    "for example segments='middle', and don't plan() it without a model"
)
NO_CHECK = (
    "the policy checks the block behind the segment against its own forecast, and no block that runs on every step stands there; "
    "leave the last block out of every segment, for example segments=(0, -1)"
)
NO_MIDDLE = (
    "the policy watches the block in the middle of the segment, and there is none that a stream of tokens enters and leaves; write "
    "segments='all' or another range of blocks"
)
NO_MODULATED = (
    "the policy watches what enters the first block's attention, and a decision on the whole prediction falls before any block; "
    "write segments='all' or another segment"
)
NO_MODEL = "the policy looks at what a model shows, and there is none here: plan() takes policies of time alone"
LACKING = MappingProxyType(
    {"probe": NO_PROBE, "front": NO_PROBE, "check": NO_CHECK, "middle": NO_MIDDLE, "modulated": NO_MODULATED}
)


@dataclass(frozen=True)
class Signal:
    """One thing to look at, as it is declared in ``Policy.needs`` and read by ``step.signal``.

    Args:
        of: ``"probe"``: the residual of the block before the segment. ``"front"``: that of all the blocks before it together,
            as far back as each gets what the one before returned. ``"middle"``: that of the block in the middle of the segment,
            known to ``update`` only, where the segment was recomputed. ``"modulated"``: what enters the attention of the stack's
            first block, that is its normed and modulated input; costs running the block up to there. ``"sample"``: the model's
            input. ``"prediction"``: what the model returns, known to ``update`` only. ``"check"``: the output of the block
            behind the segment as the segment's reuse forecasts it, compared with what it is; known to ``update`` only.
        since: when what it is compared with was kept: at the segment's last recompute, or at the step before. A check is
            compared with the same call.
    """

    of: Of
    since: Since = "recompute"

    def __post_init__(self) -> None:
        for name, known in (("of", get_args(Of)), ("since", get_args(Since))):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"Signal({name}={value!r}): write one of {', '.join(map(repr, known))}")


def signals(needs: Iterable[Any]) -> frozenset[Signal]:
    """The signals among a policy's needs; ``"probe"`` and ``"front"`` stand for those since the last recompute.

    Raises:
        ConfigError: something that no policy can need.
    """
    found = set()
    for need in needs:
        if isinstance(need, Signal):
            found.add(need)
        elif need == "probe" or need == "front":
            found.add(Signal(need))
        elif need not in ("steps", "end", "estimate"):
            raise ConfigError(
                f"a policy says that it needs {need!r}; its needs are a set of 'steps', 'end', 'estimate', 'probe', 'front' and "
                "Signals"
            )
    return frozenset(found)


class Compared:
    """A tensor and what it is compared with, for all samples of a batch. Numbers are made for all of them at once."""

    def __init__(self, value: Tensor | None, reference: Tensor | None, samples: Samples, count: Callable[[Tensor], None]) -> None:
        self.value, self.reference, self.samples, self._count = value, reference, samples, count
        self._numbers: dict[tuple[str, bool], list[float]] = {}

    def number(self, name: str, formula: Callable[..., Tensor], tensors: tuple[Tensor, ...], g: int, pooled: bool) -> float:
        """Sample g's number: its largest item's, or that of all its items together.

        Args:
            formula: takes tensors (..., n) to numbers (...).
        """
        if (name, pooled) not in self._numbers:
            if pooled and self.samples.count == 1:
                # The same sum of all numbers as in the authors' code, to the last bit: thresholds may lie close.
                numbers = formula(*(tensor.reshape(-1) for tensor in tensors)).reshape(1)
            else:
                numbers = formula(*(self.samples.arranged(tensor, pooled) for tensor in tensors)).amax(1)
            self._count(numbers)
            self._numbers[name, pooled] = numbers.expand(self.samples.count).tolist()
        return self._numbers[name, pooled][g]


class Comparison:
    """A tensor and what it is compared with, as numbers. Each costs one device synchronisation when it is first read.

    In a batch each is that of the sample whose number is the largest; with ``Step.pooled`` the means and norms are over the
    whole batch. Where one of the two is missing or they differ in shape, what needs both is infinite: a threshold on it
    recomputes.
    """

    def __init__(self, compared: Compared, g: int = 0, pooled: bool = False) -> None:
        self._compared, self._g, self._pooled = compared, g, pooled
        self.value, self.reference = compared.value, compared.reference

    def _of_both(self, name: str, formula: Callable[[Tensor, Tensor], Tensor]) -> float:
        value, reference = self.value, self.reference
        if value is None or reference is None or value.shape != reference.shape:
            return inf
        return self._compared.number(name, formula, (value, reference), self._g, self._pooled)

    @property
    def relative(self) -> float:
        """mean|value - reference| / mean|reference|."""
        return self._of_both("relative", lambda value, then: (value - then).abs().mean(-1) / then.abs().mean(-1))

    @property
    def difference(self) -> float:
        """mean|value - reference|."""
        return self._of_both("difference", lambda value, then: (value - then).abs().mean(-1))

    @property
    def elementwise(self) -> float:
        """mean(|value - reference| / (|reference| + 1e-10)): each element relative to itself."""
        return self._of_both("elementwise", lambda value, then: ((value - then).abs() / (then.abs() + 1e-10)).mean(-1))

    @property
    def euclidean(self) -> float:
        """‖value - reference‖ / ‖reference‖."""
        norm = torch.linalg.vector_norm
        return self._of_both("euclidean", lambda value, then: norm(value - then, dim=-1) / norm(then, dim=-1))

    @property
    def size(self) -> float:
        """mean|value|, infinite where it is missing."""
        if self.value is None:
            return inf
        return self._compared.number("size", lambda value: value.abs().mean(-1), (self.value,), self._g, self._pooled)
