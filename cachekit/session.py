"""Generations: what is known of a sampling run, and what a policy is told of a step in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachekit.branch import Branch
from cachekit.policy import Step


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


@dataclass(eq=False)
class Opened:
    """An explicit session that is open, and the generation to go on with when it is closed."""

    outer: Generation | None


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
