"""A policy's schedule, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.errors import ConfigError
from cachekit.policy import Step
from cachekit.spec import parse_policy
from cachekit.verdict import decided


@dataclass(frozen=True)
class Schedule:
    """Which steps a policy recomputes.

    Attributes:
        timesteps: of each step, falling.
        recompute: True where the step is recomputed.
    """

    timesteps: tuple[float, ...]
    recompute: tuple[bool, ...]

    def __iter__(self) -> Iterator[bool]:
        return iter(self.recompute)

    def __len__(self) -> int:
        return len(self.recompute)

    def __getitem__(self, i: int) -> bool:
        return self.recompute[i]

    def __str__(self) -> str:
        marks = "".join("#" if full else "." for full in self.recompute)
        return f"{marks}  {sum(self.recompute)} of {len(self)} steps recomputed (#), the others reused (.)"


def plan(policy: Any, timesteps: Sequence[float], *, range: float | None = 1000.0) -> Schedule:
    """The schedule of a policy that looks at nothing but time.

    Args:
        policy: as in ``wrap``.
        timesteps: of each step, in the scheduler's units, falling; tensors of a scheduler are fine.
        range: training range of the timesteps, None where it is unknown.

    Returns:
        One decision a step. The first is always a recompute, since nothing is stored yet.

    Raises:
        ConfigError: the policy looks at the model (``change``), or can't be read; or no timesteps are given.
    """
    rule = parse_policy(policy).policy
    if not isinstance(timesteps, Iterable):
        raise ConfigError(f"timesteps={timesteps!r}: give the timestep of each step, such as scheduler.timesteps, not how many")
    times = tuple(float(t) for t in timesteps)
    state, made, node = rule.init(), [], 0
    for i, t in enumerate(times):
        node += i > 0 and t != times[i - 1]
        step = Step(i, t, len(times), range, times[i - 1] if i else None, node)
        recompute = i == 0 or decided(rule, state, step)
        state = rule.update(state, step, recompute)
        made.append(recompute)
    return Schedule(times, tuple(made))
