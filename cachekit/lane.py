"""Where a call belongs: the generations of one thread or task, and how they are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachekit.branch import Branch, Name
from cachekit.conditions import conditions
from cachekit.inputs import Inputs
from cachekit.session import Generation, Opened
from cachekit.trajectory import AGAIN, Comparer, Trace

# A loop that looks like a new branch at every step must not keep a store for each.
MOST_BRANCHES = 8

NEW_ARGUMENTS = "arguments that no branch had before"
LEFT_OUT = "a branch that was left out for more steps than before"


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
        self.sessions: list[Opened] = []
        self.names: list[Name] = []
        self.disabled = 0
        self.aside = 0
        self.nbytes = 0
        self.comparer = Comparer()

    @property
    def under_way(self) -> bool:
        """Whether anything of a generation is stored that a call can be a step of."""
        return not self.aside and self.generation is not None and bool(self.generation.branches)

    def open(self, generation: Generation) -> Opened:
        """Calls from now on belong to this generation."""
        opened, self.generation = Opened(self.generation), generation
        self.sessions.append(opened)
        return opened

    def close(self, opened: Opened) -> bool:
        """Go on with what was before a session; False where another one was opened since and is open still."""
        k = self.sessions.index(opened)
        del self.sessions[k]
        if k == len(self.sessions):
            self.generation = opened.outer
            return True
        # Steps of the two were taken for one generation's.
        self.sessions[k].outer, self.generation = opened.outer, self.generation and self.generation.emptied()
        return False

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
        fitting = self._fitting(generation, inputs)
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

    def _fitting(self, generation: Generation, inputs: Inputs) -> list[Branch]:
        """The branches that the call's arguments fit; where its sample has to tell which of them it continues, the nearest first.

        Generations of one prompt that take turns may come out alike: a sample is then like the other ones' last as well.
        """
        fitting = [branch for branch in generation.branches if branch.fits(inputs, self.name, self.comparer)]
        sample = inputs.sample
        if len(fitting) < 2 or sample is None or generation.explicit or self.name.binding:
            return fitting
        return sorted(fitting, key=lambda branch: 0.0 if branch.trace is None else branch.trace.turned(sample, self.comparer))

    def _same_time(self, generation: Generation, fitting: Sequence[Branch], inputs: Inputs) -> Placed | None:
        rivals = [branch for branch in generation.branches if branch.name == self.name or not self.name.binding]
        here = [branch for branch in rivals if branch.t == inputs.t]
        other_sample = bool(here) and not any(self._same_sample(branch, inputs) for branch in here)
        # Where some have stayed behind, generations take turns.
        if other_sample and not generation.explicit and all(branch.i == 0 and branch.t == inputs.t for branch in rivals):
            return self._begin(inputs, generation)
        for branch in fitting:
            if not branch.name.binding and self._stayed_behind(generation, branch, inputs):
                return None
            if branch.t == inputs.t and (branch.name.binding or not self._same_sample(branch, inputs)):
                doubt = None if generation.explicit else self._doubt(branch, inputs)
                if other_sample and doubt == AGAIN:
                    return self._begin(inputs, generation)
                # What is unlike it is no second evaluation of its step, but of a generation that begins here.
                if doubt in (None, AGAIN):
                    return self._continue(generation, branch, inputs)
        return None

    def _stayed_behind(self, generation: Generation, branch: Branch, inputs: Inputs) -> bool:
        """Whether a call is the next step of a branch that takes turns with others, and no second evaluation of theirs."""
        if inputs.t is None or generation.explicit or not generation.ahead(branch.t, inputs.t):
            return False
        return self._doubt(branch, inputs) is None

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
