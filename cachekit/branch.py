"""A branch of a generation: what is stored for it, and how its next call is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cachekit.conditions import Condition, conditions
from cachekit.estimates import Miss
from cachekit.graph import Graph
from cachekit.history import History
from cachekit.inputs import Inputs
from cachekit.layout import Layout
from cachekit.sampled import Sampled
from cachekit.segments import Site
from cachekit.signals import Signal
from cachekit.trajectory import Comparer, Trace
from cachekit.tree import Path

# Segment, visit (-1 for the whole prediction), path in the visit's result.
Key = tuple[int, int, Path]


@dataclass(frozen=True)
class Name:
    """A branch's name; ``binding`` where the user gave it, a hint where a pipeline did."""

    text: str = ""
    binding: bool = False


@dataclass
class Branch:
    """One CFG pass of a generation: its last call, its graph, what is stored, and its policies' states."""

    name: Name
    inputs: Inputs
    trace: Trace | None
    conditioning: tuple[Condition, ...] = ()
    i: int = 0
    node: int = 0
    previous_t: float | None = None
    reused: int = 0
    graph: Graph | None = None
    layout: Layout | None = None
    blocks: list[str] | None = None
    sites: tuple[Site, ...] = ()
    structure: Any = None
    store: dict[Key, History] = field(default_factory=dict)
    references: dict[tuple[int, Signal], Tensor] = field(default_factory=dict)
    misses: dict[int, Miss] = field(default_factory=dict)
    # Of each module whose tokens are chosen by it (visit, number of its call): a number for each token.
    measured: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    states: list[Any] = field(default_factory=list)
    sampled: Sampled | None = None
    # The first of its generation; and what it returned last, where another branch is rebuilt from that.
    leads: bool = False
    # Of its generation's different timesteps: how many there were at its last call, and the most between two of its calls.
    met: int = 0
    stride: int = 1
    # Those whose first call had equal arguments, until this one's is over.
    twins: list[Branch] = field(default_factory=list)
    prediction: dict[Path, Tensor] = field(default_factory=dict)

    @property
    def t(self) -> float:
        """Timestep of the last call."""
        return 0.0 if self.inputs.t is None else self.inputs.t

    @property
    def batch(self) -> int:
        """Number of items in the batch: rows of the noisy sample."""
        sample = self.inputs.sample
        return sample.size(0) if sample is not None and sample.ndim else 1

    def fits(self, inputs: Inputs, name: Name, comparer: Comparer) -> bool:
        """Whether a call has this branch's shapes and conditioning, or its name."""
        if name != self.name or inputs.key != self.inputs.key:
            return False
        if name.binding:
            return True
        theirs = (tensor for _, tensor in inputs.conditioning)
        return all(ours.holds(tensor, comparer) for ours, tensor in zip(self.conditioning, theirs, strict=True))

    def move(self, inputs: Inputs) -> None:
        """Go on to the next call."""
        self.i, self.previous_t = self.i + 1, self.t
        self.node += inputs.t != self.t
        self.inputs = inputs
        self.conditioning = conditions(inputs.conditioning, () if self.name.binding else self.conditioning)
        if self.trace is not None and inputs.sample is not None:
            self.trace = self.trace.advance(inputs.sample)

    @property
    def kept(self) -> list[tuple[Tensor, Tensor, int | None]]:
        """The last call's sample and conditioning, each with a copy and how often it had been written into before."""
        conditioning = [(kept.object, kept.values, kept.version) for kept in self.conditioning]
        sample = [] if self.trace is None else [(self.trace.object, self.trace.last, self.trace.version)]
        return [*sample, *conditioning]

    def drop(self) -> None:
        """Forget the graph and everything stored; the next call is a full one."""
        self.graph = self.layout = self.blocks = self.structure = None
        self.sites = ()
        self.store, self.references, self.misses, self.ready, self.prediction = {}, {}, {}, set(), {}
        self.measured = {}
        if self.sampled is not None:
            self.sampled.drop()

    def settle(self, comparer: Comparer) -> int:
        """Let twins forget what they stored if the same call has given something else this time; returns device synchronisations.

        It is another pass (attention that was swapped), or the same generation begun again (with other weights), and then the
        next step's first call can't be told to be either's.
        """
        waits = comparer.waits
        for twin in self.twins:
            if self.sampled is not None or twin.graph != self.graph or not self._holds_as(twin, comparer):
                twin.drop()
        self.twins = []
        return comparer.waits - waits

    def _holds_as(self, twin: Branch, comparer: Comparer) -> bool:
        return twin.store.keys() == self.store.keys() and all(
            comparer.equal(history.entries[0][1], twin.store[key].entries[0][1]) for key, history in self.store.items()
        )

    @property
    def nbytes(self) -> int:
        kept = *self.references.values(), *self.prediction.values(), *self.measured.values()
        references = sum(value.numel() * value.element_size() for value in kept)
        sampled = self.sampled.nbytes if self.sampled is not None else 0
        return references + sampled + sum(history.nbytes for history in self.store.values())
