"""Strategies: random stacks, schedules, policies and reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from stack_blocks import BOXES, CALLS, GLUES, LAYOUTS, ORDERED, StackSpec
from stack_runs import Run

from cachekit import Forecast
from cachekit.policies import at_most, change, every, first, front_change, last, moved, outside
from cachekit.policy import Policy, Step

STRINGS = ("skip-every-2", "skip-every-3", "N2-700-50", "every-2 | outside-700-50", "first-2 & every-2", "at-most-2")
REUSES = ("output", "residual", "taylor-1", "taylor-2", "residual-taylor-1", "residual-taylor-2", "grid-taylor-2")
NO_GLUE = ("",) * 8


@dataclass(frozen=True)
class At(Policy[None]):
    """Recompute at these step indices and at no others."""

    indices: frozenset[int]

    def decide(self, state: None, step: Step) -> bool:
        return step.i in self.indices


@st.composite
def stack_specs(draw: Any, layouts: Sequence[str] = LAYOUTS, plain: bool = False) -> StackSpec:
    """Any stack; ``plain`` ones have one stream and nothing between the blocks, but for what the layout itself brings."""
    layout = draw(st.sampled_from(layouts))
    depth = _depth(layout, draw(st.integers(1, 8)))
    spec = StackSpec(
        layout=layout,
        depth=depth,
        order=tuple(range(depth)),
        width=draw(st.sampled_from((4, 8))),
        tokens=draw(st.sampled_from((2, 4, 6))),
        call=draw(st.sampled_from(CALLS)),
        signature=draw(st.sampled_from(("t", "timestep"))),
        output=draw(st.sampled_from(("tensor", "tuple", "dict"))),
        time=draw(st.sampled_from(("float", "int", "scalar", "number"))),
        glue=NO_GLUE,
    )
    if plain:
        return spec
    spec = replace(
        spec,
        box=draw(st.sampled_from(BOXES)),
        extras=draw(st.sampled_from((0, 0, 1, 2))),
        hint=draw(st.sampled_from(("none", "none", "argument", "passed"))),
        experts=draw(st.sampled_from((0, 0, 3))),
    )
    return _with_streams(draw, _with_writes(draw, spec))


def _depth(layout: str, depth: int) -> int:
    """The nearest depth that the layout allows."""
    if layout == "uvit-no-middle":
        return max(2, depth - depth % 2)
    if layout == "uvit":
        return max(3, depth - 1 + depth % 2)
    if layout == "latte":
        return (depth + 1) // 2
    return max(2, depth) if layout == "flux" else depth


def _with_writes(draw: Any, spec: StackSpec) -> StackSpec:
    """Blocks that write in place, glue, blocks called twice: where a layout's own meaning allows for them."""
    depth, layout = spec.depth, spec.layout
    if layout in ORDERED and draw(st.integers(0, 3)) == 0:
        spec = replace(spec, order=tuple(draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=8))))
    if layout != "sequential" and draw(st.booleans()):
        spec = replace(spec, glue=tuple(draw(st.lists(st.sampled_from(GLUES), min_size=8, max_size=8))))
    # With long skips, a block that writes into its input changes what a later one takes in: no model does that.
    if layout in (*ORDERED, "refiner", "flux", "latte") and draw(st.integers(0, 2)) == 0:
        spec = replace(spec, in_place=frozenset(draw(st.sets(st.integers(0, depth - 1)))))
    return spec


def _with_streams(draw: Any, spec: StackSpec) -> StackSpec:
    if spec.layout == "flux":
        return replace(spec, streams=2, swapped=draw(st.booleans()))
    if spec.layout in ("latte", "sequential") or draw(st.booleans()):
        return spec
    last_none = draw(st.booleans()) and spec.order == tuple(range(spec.depth)) and not spec.layout.startswith("uvit")
    return replace(spec, streams=2, swapped=draw(st.booleans()), last_none=last_none)


@st.composite
def schedules(draw: Any, min_size: int = 2, max_size: int = 12) -> tuple[float, ...]:
    """Uneven falling timesteps in 1 ... 999, whole numbers."""
    drawn = draw(st.sets(st.integers(1, 999), min_size=min_size, max_size=max_size))
    return tuple(float(t) for t in sorted(drawn, reverse=True))


def heun(times: Sequence[float]) -> tuple[float, ...]:
    """The timesteps of a solver that evaluates twice at every one but the first."""
    return (times[0], *(t for t in times[1:] for _ in range(2)))


def reuses(betas: Sequence[float] = (0.0, 0.5, 1.0)) -> st.SearchStrategy[Any]:
    """Any reuse with an input correction of these; as objects all its numbers vary."""
    strings = [name for name in REUSES if 1.0 in betas or not name.startswith("residual")]
    return st.sampled_from(strings) | forecasts(betas)


def forecasts(betas: Sequence[float] = (0.0, 0.5, 1.0)) -> st.SearchStrategy[Forecast]:
    """Reuses as objects."""
    return st.builds(
        Forecast,
        order=st.integers(0, 3),
        beta=st.sampled_from(betas),
        bound=st.sampled_from((1.5, 5.0, 50.0)),
        axis=st.sampled_from(("t", "grid")),
        blend=st.sampled_from((0.0, 0.0, 0.25, 0.875)),
    )


# Those without a state of their own.
stateless: st.SearchStrategy[Policy[Any]] = st.one_of(
    st.builds(every, st.integers(1, 4)),
    st.builds(first, st.integers(0, 4)),
    st.builds(last, st.integers(0, 3)),
    st.builds(outside, st.integers(400, 900), st.integers(0, 400)),
)
limits: st.SearchStrategy[Policy[Any]] = st.builds(at_most, st.integers(1, 3))
distances: st.SearchStrategy[Policy[Any]] = st.builds(moved, st.sampled_from((0.5, 1.0, 2.0)))
probes: st.SearchStrategy[Policy[Any]] = st.builds(change, st.sampled_from((0.01, 0.1, 0.5)))
fronts: st.SearchStrategy[Policy[Any]] = st.builds(front_change, st.sampled_from((0.01, 0.1, 0.5)))


def policies(probe: bool = False) -> st.SearchStrategy[Policy[Any]]:
    """Policies and what ``|`` and ``&`` make of them; those that watch blocks only where asked for."""
    leaves = st.one_of(stateless, limits, distances, *([probes, fronts] if probe else []))

    def combined(inner: st.SearchStrategy[Policy[Any]]) -> st.SearchStrategy[Policy[Any]]:
        return st.tuples(inner, inner, st.booleans()).map(lambda p: p[0] | p[1] if p[2] else p[0] & p[1])

    return st.recursive(leaves, combined, max_leaves=3)


runs = st.builds(Run, schedules(), st.integers(0, 9), st.sampled_from((4, 5)))
dtypes = st.sampled_from((torch.float32, torch.float16, torch.float64))
