"""Batches beside each of their samples alone: what the tests of decisions for each sample share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from cases import Case, Shape
from hypothesis import strategies as st
from torch import Tensor

from cachekit.policy import Policy, Step
from cachekit.tree import replaced, tensors

TIMES = tuple(float(t) for t in range(950, 100, -140))
SCHEDULE = tuple(float(t) for t in range(950, 100, -70))


@dataclass(frozen=True)
class Listed(Policy[frozenset[int]]):
    """Each state that is asked for is the next of a list: the steps at which to recompute. So samples differ as a test wants.

    The first state that a wrapped model asks for is the whole batch's.
    """

    steps: tuple[frozenset[int], ...]
    asked: list[int] = field(default_factory=list, compare=False)

    def init(self) -> frozenset[int]:
        self.asked.append(len(self.asked))
        return self.steps[(len(self.asked) - 1) % len(self.steps)]

    def decide(self, state: frozenset[int], step: Step) -> bool:
        return step.i in state


@dataclass(frozen=True)
class Arbitrary(Policy[int]):
    """Recompute by the digits of what the model shows: any two samples soon differ. Remembers how often it did."""

    needs = frozenset({"probe"})

    def init(self) -> int:
        return 0

    def decide(self, state: int, step: Step) -> bool:
        return step.change == inf or int(step.change * 1000 + state) % 3 == 0

    def update(self, state: int, step: Step, recomputed: bool) -> int:
        return state + recomputed


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding.

    A matrix product of another batch size may add up in another order: a few roundings of 2^-53 a block, of values around 10; a
    forecast passes them on up to 50 times as large (the bound), and the blocks behind up to ten times, over at most eight. What
    is observed is below 1e-13. One row of another sample, or of another step, shows in the first digits.
    """
    return torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def of_one(tensor: Tensor, g: int, passes: int) -> Tensor:
    """Sample g's items of a tensor with one row an item, laid out as a batch of its own would be."""
    return tensor[g :: len(tensor) // passes].contiguous()


def assert_exact(found: list[Tensor], theirs: list[list[Tensor]], passes: int) -> None:
    for g, alone in enumerate(theirs):
        for i, (ours, other) in enumerate(zip(found, alone, strict=True)):
            assert same(of_one(ours, g, passes), other), f"sample {g}, step {i}"


batches = st.integers(2, 4).flatmap(lambda count: st.tuples(st.just(count), st.sampled_from((1, 1, 2))))


@st.composite
def listed(draw: Any, count: int, steps: int) -> list[frozenset[int]]:
    """For each sample the steps at which to recompute."""
    one = st.frozensets(st.integers(0, steps - 1))
    return draw(st.lists(one, min_size=count, max_size=count))  # type: ignore[no-any-return]


def of_architecture(case: Case, model: Any, cut: Any, batch: int, times: Sequence[float]) -> list[Tensor]:
    """Predictions for what ``cut`` makes of each call's arguments, which keeps the conditioning's tensors over a generation."""
    shape = Shape(batch, torch.float64)
    given = cut(case.conditioning(0, shape))
    found = []
    with torch.no_grad():
        for t in times:
            step = {
                name: value for name, value in case.inputs(t, batch, 0, torch.float64, start=times[0]).items() if name not in given
            }
            found.append(case.output(model(**cut(step), **given)).clone())
    return found


def cutting(batch: int, g: int, passes: int) -> Any:
    """Sample g's items of every tensor that has one row an item. No table of the small models has as few rows as a batch here."""

    def cut(given: Any) -> Any:
        rows = {path: of_one(tensor, g, passes) for path, tensor in tensors(given) if tensor.ndim and len(tensor) == batch}
        return replaced(given, rows)

    return cut
