"""What a branch keeps for each sample of its batch, where samples are decided on one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cachekit.policy import Policy
from cachekit.sample_history import SampleHistory
from cachekit.samples import Samples
from cachekit.tree import Path


@dataclass(frozen=True)
class Taken:
    """A call's tensors, arguments or results: the shapes of all, and the paths of those that have the batch's rows."""

    shapes: dict[Path, tuple[int, ...]]
    paths: frozenset[Path]


@dataclass(frozen=True)
class Batched:
    """The arguments and the results of a model call, of each visit in it, and of each call of a module in a visit."""

    model: tuple[Taken, Taken]
    visits: tuple[tuple[Taken, Taken], ...]
    modules: dict[tuple[int, int], tuple[Taken, Taken]]


@dataclass
class Sampled:
    """The samples of a branch.

    Attributes:
        samples: how the batch is made up.
        states: for each segment, its policy's state for each sample.
        store: what is stored, by segment, visit and path.
        batched: which tensors have the batch's rows; None where that can't be known, so that one decision holds for all.
    """

    samples: Samples
    states: list[list[Any]] = field(default_factory=list)
    store: dict[tuple[int, int, Path], SampleHistory] = field(default_factory=dict)
    batched: Batched | None = None

    def fit(self, policies: Sequence[Policy[Any]]) -> None:
        """Put every policy at its start for every sample, where there are as many segments for the first time."""
        if len(self.states) != len(policies):
            self.states = [[policy.init() for _ in self.samples.all] for policy in policies]

    def drop(self) -> None:
        """Forget everything stored, and the graph that it was stored for."""
        self.store, self.batched = {}, None

    @property
    def nbytes(self) -> int:
        return sum(history.nbytes for history in self.store.values())
