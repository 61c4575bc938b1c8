"""Generations of one prompt that take turns while their samples grow alike: real ones, complex ones, and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import SCHEDULE, assert_equal
from torch import Tensor, nn
from wrapping import stats

import cachekit
from cachekit.policies import every, first
from cachekit.trajectory import AGAIN, OTHER, Comparer, Trace

TOKENS = 50
# Whatever is reused was stored at the first step of a generation: values of another one can't be missed.
POLICIES = {"held": first(1), "every second": every(2)}
kinds = pytest.mark.parametrize("kind", ["real", "complex", "tokens"])


class Model(nn.Module):
    """Four blocks of width 8 over real samples (B, 16, 8), complex ones (B, 16, 4) or tokens (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(TOKENS, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        if x.is_complex():
            x = torch.view_as_real(x).flatten(-2)
        h: Tensor = x if x.is_floating_point() else self.tokens(x)
        for block in self.blocks:
            h = block(h) + h * (timestep / 1000)
        return h


def drawn(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        return torch.randint(TOKENS, (1, 64), generator=generator)
    dtype, width = (torch.complex64, 4) if kind == "complex" else (torch.float32, 8)
    return torch.randn(1, 16, width, generator=generator, dtype=dtype)


def sample(kind: str, seed: int, k: int) -> Tensor:
    """Step k of a trajectory whose end is the same for all seeds, by four fifths: no two of them are at a right angle there."""
    share, own, common = 0.8 * k / (len(SCHEDULE) - 1), drawn(kind, seed), drawn(kind, 99)
    if kind == "tokens":
        return torch.where(torch.arange(64) < 64 * share, common, own)
    return (1 - share) * own + share * common


def predictions(policy: Any, where: str, kind: str, turns: Sequence[Sequence[int]]) -> tuple[dict[int, list[Tensor]], Any]:
    """What each seed's steps return, seeds in this order at each step, and the statistics."""
    model = cachekit.wrap(Model().eval(), policy, segments=where, adapter=cachekit.Adapter(range=1000))
    found: dict[int, list[Tensor]] = {seed: [] for seed in turns[0]}
    for k, order in enumerate(turns):
        for seed in order:
            found[seed].append(model(sample(kind, seed, k), timestep=torch.tensor([SCHEDULE[k]])).clone())
    return found, stats(model)


@torch.no_grad()
@kinds
@pytest.mark.parametrize("segments", ["middle", "model"])
@given(
    turns=st.lists(st.permutations((1, 2, 3)), min_size=len(SCHEDULE), max_size=len(SCHEDULE)), policy=st.sampled_from([*POLICIES])
)
def test_each_goes_on_with_its_own(kind: str, segments: str, turns: list[list[int]], policy: str) -> None:
    found, counted = predictions(POLICIES[policy], segments, kind, turns)
    for seed in turns[0]:
        # Until another timestep shows that they take turns, all but the last look aborted at once; then they begin anew.
        begun = seed != turns[0][-1]
        alone: list[Tensor] = []
        model = cachekit.wrap(Model().eval(), POLICIES[policy], segments=segments, adapter=cachekit.Adapter(range=1000))
        for k in range(begun, len(SCHEDULE)):
            alone.append(model(sample(kind, seed, k), timestep=torch.tensor([SCHEDULE[k]])).clone())
        assert_equal(found[seed][begun:], alone)
    assert counted.blocks_run < counted.blocks_total


@kinds
def test_what_speaks_against_a_step(kind: str) -> None:
    comparer, first, second, other = Comparer(), sample(kind, 1, 0), sample(kind, 1, 1), sample(kind, 2, 1)
    begun = Trace.start(first)
    assert begun.follows(second, comparer) is None and begun.follows(other, comparer) == OTHER
    moved = begun.advance(second)
    assert moved.follows(first.clone(), comparer) == AGAIN
    assert moved.turned(sample(kind, 1, 2), comparer) < moved.turned(sample(kind, 2, 2), comparer)
