"""When to recompute: the protocol every policy follows, and how policies combine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ConfigDict

from cachekit.errors import ConfigError
from cachekit.signals import LACKING, NO_MODEL, Comparison, Signal
from cachekit.verdict import decided

S = TypeVar("S")

# For policies and reuses: without it pydantic ignores a misspelt keyword, and the default is used in silence.
STRICT = ConfigDict(extra="forbid")

NO_ESTIMATE = (
    "step.estimate is the error of a forecast from what a model's sites hold: don't plan() the policy without a model, "
    'and let a policy of your own say needs = frozenset({"estimate"})'
)


@dataclass(frozen=True)
class Step:
    """One model call of one branch, as a policy sees it.

    Attributes:
        i: index of the step in its generation and branch, from 0.
        t: timestep in the scheduler's units, falling (0 ... ``range``).
        steps: number of steps of the generation, where known.
        range: the training range of ``t`` (1000 for most models), where known.
        previous_t: ``t`` of the step before in this branch; None at the first.
        node: index of ``t`` among the different timesteps of this branch so far; unlike ``i`` it stands still at the second
            evaluation of a solver that has two at one timestep.
        branch: name of the branch; empty where there is only one.
    """

    i: int
    t: float
    steps: int | None = None
    range: float | None = None
    previous_t: float | None = None
    node: int = 0
    branch: str = ""
    look: Callable[[Signal], Comparison] | None = field(default=None, repr=False, compare=False)
    estimated: Callable[[], float] | None = field(default=None, repr=False, compare=False)
    together: Callable[[], Step] | None = field(default=None, repr=False, compare=False)

    @property
    def pooled(self) -> Step:
        """This step with the means of signals over the whole batch, as most authors' code has them, not the largest sample's.

        Where each sample is decided on by itself, both are its own.
        """
        return self if self.together is None else self.together()

    def signal(self, signal: Signal) -> Comparison:
        """What the model shows in this call against what it showed before. Reading a number of it may wait for the device.

        Args:
            signal: one of those that the policy declares in ``needs``.

        Raises:
            ConfigError: it is not declared, there is nothing to look at, or there is no model (``plan``).
        """
        if self.look is None:
            raise ConfigError(LACKING[signal.of] if signal.of in ("probe", "front") else NO_MODEL)
        return self.look(signal)

    @property
    def estimate(self) -> float:
        """Estimated error of reusing the site at this step, relative to its output: from what is stored, without running anything.

        Infinite until a recompute has shown what a forecast would have missed there (``cachekit.estimates``). Reading it costs
        one device synchronisation, and one more after a recompute.

        Raises:
            ConfigError: the policy does not say in ``needs`` that it reads it, or there is no model (``plan``).
        """
        if self.estimated is None:
            raise ConfigError(NO_ESTIMATE)
        return self.estimated()

    @property
    def change(self) -> float:
        """Mean absolute change of the probe block's residual since the last recompute, relative to it.

        The probe block is the one before the segment. In a batch it is the change of the sample that changed most. Reading it
        costs one device synchronisation.

        Raises:
            ConfigError: the segment has no block before it (``"all"``, ``"model"``), or there is no model (``plan``).
        """
        return self.signal(Signal("probe")).relative

    @property
    def front_change(self) -> float:
        """As ``change``, of what the blocks before the segment add together, as far back as each gets what the one before returned.

        Behind one block it is ``change``.

        Raises:
            ConfigError: as ``change``.
        """
        return self.signal(Signal("front")).relative


class Policy(Generic[S]):
    """Which steps to *recompute*. Immutable: all that changes is the state, which the session keeps per branch.

    Override ``decide``; a policy that remembers something overrides ``init`` and ``update`` too. There are three functions
    because a policy inside a combination must learn the *combined* decision to reset what it accumulates.
    Whether anything is stored yet is the session's business: it recomputes then, whatever the policy says.

    Attributes:
        needs: what the policy can't work without: each ``Signal`` that it reads with ``step.signal``, where ``"probe"``
            (``step.change``) and ``"front"`` (``step.front_change``) are short for two of them; ``"steps"`` (``step.steps``),
            ``"end"`` (``step.steps`` or ``step.range``), ``"estimate"`` (``step.estimate``). Where one is missing, stats say so
            (steps, end), or wrap or the first step raises (signals).
    """

    needs: ClassVar[frozenset[str | Signal]] = frozenset()

    def init(self) -> S:
        """The state at the start of a generation; None unless overridden."""
        return None  # type: ignore[return-value]

    def decide(self, state: S, step: Step) -> bool:
        """True to recompute, False to reuse. Must not depend on anything but its arguments."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(self, state, step) -> bool")

    def update(self, state: S, step: Step, recomputed: bool) -> S:
        """The state after a step in which the segment was recomputed or reused; the same unless overridden."""
        return state

    def required(self) -> frozenset[str | Signal]:
        """What this policy and those inside it need."""
        return self.needs

    def __or__(self, other: Policy[Any]) -> Policy[Any]:
        """Recompute where either does."""
        return AnyOf(self, other) if isinstance(other, Policy) else NotImplemented

    def __and__(self, other: Policy[Any]) -> Policy[Any]:
        """Recompute where both do."""
        return AllOf(self, other) if isinstance(other, Policy) else NotImplemented


@dataclass(frozen=True)
class _Pair(Policy[tuple[Any, Any]]):
    a: Policy[Any]
    b: Policy[Any]

    def init(self) -> tuple[Any, Any]:
        return self.a.init(), self.b.init()

    def update(self, state: tuple[Any, Any], step: Step, recomputed: bool) -> tuple[Any, Any]:
        return self.a.update(state[0], step, recomputed), self.b.update(state[1], step, recomputed)

    def required(self) -> frozenset[str | Signal]:
        return self.a.required() | self.b.required()


@dataclass(frozen=True)
class AnyOf(_Pair):
    """``a | b``."""

    def decide(self, state: tuple[Any, Any], step: Step) -> bool:
        return decided(self.a, state[0], step) or decided(self.b, state[1], step)


@dataclass(frozen=True)
class AllOf(_Pair):
    """``a & b``."""

    def decide(self, state: tuple[Any, Any], step: Step) -> bool:
        return decided(self.a, state[0], step) and decided(self.b, state[1], step)
