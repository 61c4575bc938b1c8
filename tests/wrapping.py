"""What is wrapped and how: one random case, and what its segments cover, worked out apart from the core."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from drawing import STRINGS, forecasts, policies, reuses, stack_specs
from hypothesis import strategies as st
from stack_blocks import LAYOUTS, StackSpec
from stack_runs import Run
from stacks import Stack, build, visits_of
from torch import Tensor, nn

import cachekit


def handle(model: nn.Module) -> cachekit.Handle:
    """A wrapped model's handle."""
    found = model.cachekit
    assert isinstance(found, cachekit.Handle)
    return found


def stats(model: nn.Module) -> cachekit.Stats:
    """What a wrapped model says of itself."""
    return handle(model).stats


def snapshot(model: nn.Module) -> list[Any]:
    """Each module's ``__dict__``: names in order, the objects, and what lies in those that are dictionaries."""
    return [
        (path, key, value, list(value.items()) if isinstance(value, dict) else [])
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key != "calls"
    ]


def identical(before: list[Any], after: list[Any]) -> bool:
    """Whether two snapshots hold the same objects under the same names in the same order."""

    def ids(found: list[Any]) -> list[Any]:
        return [(path, key, id(value), [(k, id(v)) for k, v in inner]) for path, key, value, inner in found]

    return ids(before) == ids(after)


@dataclass(frozen=True)
class Case:
    """One model and how it is wrapped.

    Attributes:
        explicit: generations run in a session that knows their steps, or in none.
    """

    spec: StackSpec
    policy: Any
    segments: Any
    reuse: Any
    explicit: bool

    def build(self) -> Stack:
        """The model alone."""
        return build(self.spec)

    def wrap(self, model: Stack | None = None, adapter: cachekit.Adapter | None = None) -> Stack:
        """A wrapped model of the case: a new one unless one is given."""
        model = self.build() if model is None else model
        return cachekit.wrap(model, self.policy, segments=self.segments, reuse=self.reuse, adapter=adapter)

    def under(self, policy: Any, segments: Any = None) -> Case:
        """The same with another policy for every segment, and other segments where some are given."""
        where = self.segments if segments is None else segments
        if isinstance(where, list):
            where = [replace(item, policy=None) if isinstance(item, cachekit.Segment) else item for item in where]
        return replace(self, policy=policy, segments=where)

    def session(self, model: Stack, times: Sequence[float]) -> contextlib.AbstractContextManager[Any]:
        """What a generation of the case runs in."""
        return handle(model).session(timesteps=times) if self.explicit else contextlib.nullcontext()

    def run(self, model: Stack, run: Run) -> list[Tensor]:
        """One generation."""
        with self.session(model, run.times):
            return run.outputs(model)

    def wide(self) -> Case:
        """The same on longer samples. Two noises of six numbers can point the same way by chance; of forty-eight they can't."""
        return replace(self, spec=replace(self.spec, tokens=max(self.spec.tokens, 4)))

    def implicit(self) -> Case:
        """The same without sessions, so that generations must be told apart by what they show."""
        return replace(self.wide(), explicit=False)


@st.composite
def segments(draw: Any, n: int, model: bool = True) -> Any:
    """Segments that fit a stack of n blocks, in all ways to write them."""
    kind = draw(st.sampled_from(["middle", "all", "skip", "pair", "several", "own", "object", *["model"] * model]))
    if kind in ("middle", "all", "model"):
        return draw(st.sampled_from((None, "middle"))) if kind == "middle" else kind
    if kind == "skip":
        return f"skip-{draw(st.integers(0, n // 2))}"
    cuts = sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=4)))
    pairs = list(pairwise(cuts))
    if kind == "several":
        return pairs
    if kind == "own":
        return [cachekit.Segment(*pair, policy=draw(policies()), reuse=draw(st.none() | forecasts((0.0,)))) for pair in pairs]
    return pairs[0] if kind == "pair" else cachekit.Segment(pairs[0][0], None if pairs[0][1] == n else pairs[0][1] - n)


def ranges(written: Any, n: int) -> list[range]:
    """The visits that each segment covers, of n."""
    if written is None or written == "middle":
        return [range(1, n - 1)]
    if isinstance(written, str):
        k = 0 if written in ("all", "model") else int(written.removeprefix("skip-"))
        return [range(k, n - k)]
    if isinstance(written, list):
        return [found for item in written for found in ranges(item, n)]
    pair: tuple[Any, Any] = (written.start, written.stop) if isinstance(written, cachekit.Segment) else written
    return [range(n)[slice(*pair)]]


def covered(written: Any, n: int) -> set[int]:
    """The visits that any of the segments covers."""
    return {v for found in ranges(written, n) for v in found}


@st.composite
def cases(
    draw: Any,
    model: bool = True,
    layouts: Sequence[str] = LAYOUTS,
    betas: Sequence[float] = (0.0, 0.5, 1.0),
    plain: bool = False,
) -> Case:
    """Anything that can be wrapped, in any way."""
    spec = draw(stack_specs(layouts, plain))
    n = len(visits_of(build(spec)))
    where = draw(segments(n, model))
    probe = where != "model" and not isinstance(where, list) and min(covered(where, n), default=0) > 0
    policy = draw(policies(probe) | st.sampled_from(STRINGS))
    return Case(spec, policy, where, draw(reuses(betas)), draw(st.booleans()))
