"""Generations, their branches, and what is stored for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cachekit.conditions import Condition, conditions
from cachekit.estimates import Miss
from cachekit.graph import Graph
from cachekit.inputs import Inputs
from cachekit.layout import Layout
from cachekit.policy import Step
from cachekit.reuse import History
from cachekit.sampled import Sampled
from cachekit.segments import Site
from cachekit.signals import Signal
from cachekit.trajectory import AGAIN, Comparer, Trace
from cachekit.tree import Path

# A loop that looks like a new branch at every step must not keep a store for each.
MOST_BRANCHES = 8

NEW_ARGUMENTS = "arguments that no branch had before"
LEFT_OUT = "a branch that was left out for more steps than before"


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


@dataclass
class Generation:
    """One sampling run.

    Attributes:
        steps: its number of steps, where an explicit session says so.
        explicit: opened by ``session()``: nothing is guessed from the samples.
        rising: time was seen to rise; None until the second step.
        nodes, passed: number of different timesteps so far, and those at which nothing was seen before anything else was.
        strange: whether steps of which nothing was seen have turned out to be another generation's, since the last that was.
    """

    steps: int | None = None
    explicit: bool = False
    branches: list[Branch] = field(default_factory=list)
    t: float | None = None
    rising: bool | None = None
    nodes: int = 0
    passed: set[float] = field(default_factory=set)
    strange: bool = False

    def reach(self, t: float | None) -> int:
        """A call at t: how many different timesteps there were, with this one."""
        self.nodes += t != self.t and t not in self.passed
        self.t, self.strange = t, False
        return self.nodes

    def pass_by(self, t: float) -> None:
        """A step at t of which nothing was seen; after one that is not ahead, it is another generation's."""
        self.strange = self.strange or self.t is None or not self.ahead(self.t, t)
        if not self.strange and t not in self.passed:
            self.passed.add(t)
            self.nodes += 1

    def emptied(self, missed: int = 0) -> Generation | None:
        """What goes on of it with nothing stored: of an explicit one the steps that are left, which count from 0 again.

        Args:
            missed: steps that no branch knows of. Where it is one too many, guards of the last steps begin one step early.
        """
        if not self.explicit:
            return None
        done = missed + max([self.nodes, *(branch.i + 1 for branch in self.branches)])
        return Generation(None if self.steps is None else max(1, self.steps - done), explicit=True)

    def ahead(self, before: float, now: float) -> bool:
        """Whether time went on."""
        return now > before if self.rising else now < before


@dataclass(frozen=True)
class Placed:
    """Where a call belongs: its branch, and whether that began a generation; ``doubt`` says what was ambiguous."""

    branch: Branch
    new_generation: bool = False
    doubt: str | None = None


class Lane:
    """The generations of one thread or asyncio task."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.names: list[Name] = []
        self.disabled = 0
        self.nbytes = 0
        self.comparer = Comparer()

    @property
    def under_way(self) -> bool:
        """Whether anything of a generation is stored."""
        return self.generation is not None and bool(self.generation.branches)

    def pass_by(self, t: float | None) -> None:
        """A call at t is made without the cache: what was left out for it is older than its branch's steps say."""
        if self.generation is not None and t is not None:
            self.generation.pass_by(t)

    @property
    def name(self) -> Name:
        return self.names[-1] if self.names else Name()

    def place(self, inputs: Inputs, known_direction: bool) -> Placed:
        """Find the branch that a call continues, or begin one, or begin a generation."""
        generation, t = self.generation, inputs.t
        if t is None:
            raise ValueError("a call with mixed timesteps has no place in a generation")
        if generation is None or generation.t is None:
            return self._begin(inputs, generation)
        fitting = [branch for branch in generation.branches if branch.fits(inputs, self.name, self.comparer)]
        if generation.rising is None and t != generation.t:
            upwards = t > generation.t and not known_direction
            generation.rising = upwards and bool(fitting) and self._doubt(fitting[0], inputs) is None
        if t != generation.t and not generation.ahead(generation.t, t):
            return self._begin(inputs, generation)
        # First: branches of one generation share their samples, so that a second evaluation of one that is here already can't be
        # the first one of another that fits as well but has stayed behind (the twin that an aborted run left).
        if (placed := self._same_time(generation, fitting, inputs)) is not None:
            return placed
        doubt, twins = None, []
        for branch in fitting:
            if generation.ahead(branch.t, t):
                doubt = None if generation.explicit else self._doubt(branch, inputs)
                if doubt is None:
                    return self._continue(generation, branch, inputs)
                if doubt == AGAIN:
                    return Placed(self._begin(inputs, None).branch, True, doubt)
            elif not generation.explicit and not self._same_sample(branch, inputs):
                doubt = self._doubt(branch, inputs)
            elif not generation.explicit and branch.i == 0 and branch.trace is not None and not branch.trace.ends_in(inputs.sample):
                twins.append(branch)
        if not fitting and t != generation.t and any(branch.name == self.name for branch in generation.branches):
            doubt = NEW_ARGUMENTS
        begun = self._branch(generation, inputs)
        begun.twins = twins
        return Placed(begun, False, doubt)

    def _same_time(self, generation: Generation, fitting: Sequence[Branch], inputs: Inputs) -> Placed | None:
        rivals = [branch for branch in generation.branches if branch.name == self.name or not self.name.binding]
        here = [branch for branch in rivals if branch.t == inputs.t]
        other_sample = bool(here) and not any(self._same_sample(branch, inputs) for branch in here)
        # Where some have stayed behind, generations take turns.
        if other_sample and not generation.explicit and all(branch.i == 0 and branch.t == inputs.t for branch in rivals):
            return self._begin(inputs, generation)
        for branch in fitting:
            if branch.t == inputs.t and (branch.name.binding or not self._same_sample(branch, inputs)):
                doubt = None if generation.explicit else self._doubt(branch, inputs)
                if other_sample and doubt == AGAIN:
                    return self._begin(inputs, generation)
                # What is unlike it is no second evaluation of its step, but of a generation that begins here.
                if doubt in (None, AGAIN):
                    return self._continue(generation, branch, inputs)
        return None

    def _begin(self, inputs: Inputs, generation: Generation | None) -> Placed:
        explicit = generation is not None and generation.explicit
        steps = generation.steps if generation is not None else None
        self.generation = Generation(steps, explicit)
        return Placed(self._branch(self.generation, inputs), True)

    def _branch(self, generation: Generation, inputs: Inputs) -> Branch:
        trace = None if inputs.sample is None else Trace.start(inputs.sample)
        branch = Branch(self.name, inputs, trace, conditions(inputs.conditioning), leads=generation.t is None)
        generation.branches.append(branch)
        del generation.branches[:-MOST_BRANCHES]
        branch.met = generation.reach(inputs.t)
        return branch

    def _continue(self, generation: Generation, branch: Branch, inputs: Inputs) -> Placed:
        branch.move(inputs)
        left_out, branch.met = generation.reach(inputs.t) - branch.met, generation.nodes
        if left_out <= branch.stride:
            return Placed(branch)
        # Guidance that is on again, a prompt that is back: what is stored is older than any policy takes it for.
        branch.stride = left_out
        branch.drop()
        return Placed(branch, doubt=LEFT_OUT)

    def _doubt(self, branch: Branch, inputs: Inputs) -> str | None:
        if branch.trace is None or inputs.sample is None:
            return None
        return branch.trace.follows(inputs.sample, self.comparer)

    def _same_sample(self, branch: Branch, inputs: Inputs) -> bool:
        return branch.trace is not None and inputs.sample is not None and branch.trace.ends_at(inputs.sample, self.comparer)


def step_of(branch: Branch, generation: Generation, time_range: float | None) -> Step:
    """What a policy sees of a branch's current call."""
    return Step(
        i=branch.i,
        t=branch.t,
        steps=generation.steps,
        range=time_range,
        previous_t=branch.previous_t,
        node=branch.node,
        branch=branch.name.text,
    )
