"""AdaCache, "adacache"."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import ClassVar

from pydantic import PositiveFloat, PositiveInt, validate_call
from pydantic.dataclasses import dataclass

from cachekit.errors import ConfigError
from cachekit.policies.last import last
from cachekit.policy import STRICT, Policy, Step
from cachekit.preset import Preset
from cachekit.signals import Signal

MIDDLE = Signal("middle")
# The authors' for 100 steps.
CODEBOOK: Mapping[float, int] = MappingProxyType({0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3})


@dataclass(frozen=True)
class Due:
    """When the last recompute was, and how many steps after it the next one is."""

    last: int = 0
    wait: int = 0


@dataclass(frozen=True, config=STRICT)
class paced(Policy[Due]):
    """After each recompute, look up how long to wait for the next in a codebook of (change a step, number of steps).

    The change is that of the residual of the block in the middle of the segment since the recompute before, a step. The first entry
    that it stays under says how many steps on the next recompute is, the last entry where it stays under none; 1 after the first
    recompute, which nothing precedes. Costs one device synchronisation a recompute, and none on reused steps.

    Raises:
        ConfigError: no entries, or their changes don't rise.
    """

    needs: ClassVar[frozenset[str | Signal]] = frozenset({MIDDLE})
    codebook: tuple[tuple[PositiveFloat, PositiveInt], ...]

    def __post_init__(self) -> None:
        changes = [change for change, _ in self.codebook]
        if not changes or changes != sorted(set(changes)):
            raise ConfigError(
                f"the changes of a codebook must rise from one to the next, not {changes}; sort it, and leave none twice"
            )

    def init(self) -> Due:
        return Due()

    def decide(self, state: Due, step: Step) -> bool:
        return step.i >= state.last + state.wait

    def update(self, state: Due, step: Step, recomputed: bool) -> Due:
        return Due(step.i, self._wait(step.pooled.signal(MIDDLE).relative, step.i - state.last)) if recomputed else state

    def _wait(self, change: float, steps: int) -> int:
        if not isfinite(change) or not steps:
            return 1
        return next((wait for bound, wait in self.codebook if change / steps < bound), self.codebook[-1][1])


@validate_call
def adacache(*, codebook: tuple[tuple[PositiveFloat, PositiveInt], ...] = tuple(CODEBOOK.items())) -> Preset:
    """The less the block in the middle changes a step, the longer until the next full one (AdaCache, arXiv 2411.02397).

    The authors reuse the residual of every attention and MLP: the same sum as that of the whole stack, which is one tensor. The
    first and the last two steps are full, as in their code. They watch one attention of the middle block, here it is all that the
    block adds; their option to scale the change by the motion in a video is not there. Holds one tensor a stream, and one more.

    Args:
        codebook: (change a step, number of steps until the next full one), changes rising. The default is the authors' for
            100 steps; with fewer, scale both.
    """
    return Preset(last(2) | paced(codebook), segments="all", reuse="residual")
