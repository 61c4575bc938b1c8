"""Blocks whose work is not all in what they return: they write into what they take, or into something beside the stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from wrapping import stats

import cachekit
from cachekit.policies import every

TIMES = (900.0, 700.0, 500.0, 300.0)
PLAIN = cachekit.Adapter(range=1000)
inference = pytest.mark.parametrize("inference", [False, True])


class Block(nn.Module):
    """It adds to the stream, and to ``beside``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, beside: Any) -> Tensor:
        h = torch.tanh(self.layer(x + t))
        if isinstance(beside, list):
            beside.append(h)
        elif isinstance(beside, dict):
            beside["sum"] = beside.get("sum", 0) + h
        elif beside is not None:
            beside.add_(h)
        return x + h


class InPlace(Block):
    """It writes into the stream, and returns it."""

    def forward(self, x: Tensor, t: Tensor, beside: Any) -> Tensor:
        return x.add_(torch.tanh(self.layer(x + t)))


class Model(nn.Module):
    """x: (B, 8). Of its six blocks those that ``writes`` names get something beside the stream."""

    def __init__(self, make: Callable[[], Any], writes: frozenset[int] = frozenset(), kind: type[Block] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.writes = make, writes
        self.blocks = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        beside, x, t = self.make(), x.clone(), timestep / 1000
        for k, block in enumerate(self.blocks):
            found = block(x, t, beside if k in self.writes else None)
            # What a block that writes into the stream returns, nobody looks at.
            x = x if isinstance(block, InPlace) else found
        total = sum(beside) if isinstance(beside, list) else beside.get("sum", 0) if isinstance(beside, dict) else beside
        return x + total


def naive(model: Model, xs: list[Tensor], free: list[int]) -> list[Tensor]:
    """Every second step, of the blocks that are free and without a gap between them, each stretch's last output as it was."""
    held: dict[int, Tensor] = {}
    found = []
    for i, (x, time) in enumerate(zip(xs, TIMES, strict=True)):
        beside, x, t = model.make(), x.clone(), torch.tensor([time]) / 1000
        for k, block in enumerate(model.blocks):
            if k in free and i % 2:
                x = held[k] if k + 1 not in free else x
            else:
                x = block(x, t, beside if k in model.writes else None)
                held[k] = x.clone()
        total = sum(beside) if isinstance(beside, list) else beside.get("sum", 0) if isinstance(beside, dict) else beside
        found.append(x + total)
    return found


def sampled(model: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    return [model(x, timestep=torch.tensor([t])) for x, t in zip(xs, TIMES, strict=True)]


def samples() -> list[Tensor]:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    return [x + 0.01 * k for k in range(len(TIMES))]


@inference
@pytest.mark.parametrize("make", [list, dict, lambda: torch.zeros(2, 8)], ids=["list", "dict", "tensor"])
@given(writes=st.frozensets(st.integers(0, 5), min_size=1))
def test_what_writes_beside_the_stream_runs(make: Callable[[], Any], inference: bool, writes: frozenset[int]) -> None:
    """And the others are reused as they would be on their own."""
    model, xs = Model(make, writes).eval(), samples()
    with torch.inference_mode(inference), torch.no_grad():
        expected = naive(model, xs, [k for k in range(6) if k not in writes])
        found = sampled(cachekit.wrap(model, every(2), segments="all", adapter=PLAIN), xs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    note = "a Block changes something that it takes and doesn't return, so that it runs on every step"
    assert note in stats(model).notes and not stats(model).dropped
    assert stats(model).blocks_run == 4 * 6 - 2 * (6 - len(writes))


@inference
@pytest.mark.parametrize("segments", ["all", "skip-2", (0, 4)])
def test_a_stream_that_is_written_into_and_never_returned(inference: bool, segments: Any) -> None:
    """The forecast is put where the model goes on with it."""
    model, xs = Model(lambda: 0, kind=InPlace).eval(), samples()
    covered = {"all": range(6), "skip-2": range(2, 4), (0, 4): range(4)}[segments]
    with torch.inference_mode(inference), torch.no_grad():
        expected = naive(model, xs, list(covered))
        found = sampled(cachekit.wrap(model, every(2), segments=segments, adapter=PLAIN), xs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert stats(model).blocks_run == 4 * 6 - 2 * len(covered)


@given(writes=st.frozensets(st.integers(0, 5), min_size=1, max_size=5), reuse=st.sampled_from(["residual", "residual-taylor-1"]))
def test_what_enters_behind_a_block_that_always_runs_is_known_at_once(writes: frozenset[int], reuse: str) -> None:
    """A residual counts from where its stretch begins; no step is lost to finding that out."""
    model = cachekit.wrap(Model(list, writes).eval(), every(2), segments="all", reuse=reuse, adapter=PLAIN)
    with torch.no_grad():
        sampled(model, samples())
    assert stats(model).blocks_run == 4 * 6 - 2 * (6 - len(writes))


class Controlled(nn.Module):
    """Six blocks, between which it adds to the stream in place from a step on, as control signals are added."""

    def __init__(self, at: int, begins: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.at, self.begins, self.calls = at, begins, 0
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x, timestep / 1000, None)
            if k == self.at and self.calls >= self.begins:
                x += 3.0
        self.calls += 1
        return x


@given(at=st.integers(0, 3), reused=st.sampled_from([(2, 1), (2, 3), (3, 1), (3, 2)]))
def test_what_is_added_in_place_between_blocks_is_seen(at: int, reused: tuple[int, int]) -> None:
    """Before and within what is reused, under inference mode, where no versions tell, as without it: begun again in full."""
    period, begins = reused
    xs, found = samples(), []
    for mode in (torch.inference_mode, torch.no_grad):
        model = cachekit.wrap(Controlled(at, begins).eval(), every(period), segments=(1, 5), adapter=PLAIN)
        with mode():
            found.append((sampled(model, xs), dict(stats(model).dropped), stats(model).blocks_run))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1:] == found[1][1:]


class Gathering(nn.Module):
    """Its blocks return a list with nothing in it, into which it writes; the caller gives it another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Empty() for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor, gathered: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x, found = block(x, timestep / 1000, None)
            found.append(x)
            x = x * len(found)
        gathered.append(x)
        return x


class Empty(Block):
    def forward(self, x: Tensor, t: Tensor, beside: Any) -> Any:
        return super().forward(x, t, beside), []


@pytest.mark.parametrize("audit", [None, 1])
def test_a_list_with_nothing_in_it_stays_its_owners(audit: int | None) -> None:
    """Reused steps get one each, and the full pass in the shadow has one of its own."""
    model, xs = Gathering().eval(), samples()
    held, expected = torch.empty(0), []
    with torch.no_grad():
        for i, (x, time) in enumerate(zip(xs, TIMES, strict=True)):
            t = torch.tensor([time]) / 1000
            if i % 2 == 0:
                held = x
                for block in model.blocks[:3]:
                    held, _ = block(held, t, None)
            expected.append(model.blocks[3](held, t, None)[0])
        cachekit.wrap(model, every(2), segments=(0, 3), adapter=PLAIN, audit_every=audit)
        for x, time, wanted in zip(xs, TIMES, expected, strict=True):
            gathered: list[Tensor] = []
            assert torch.equal(model(x, timestep=torch.tensor([time]), gathered=gathered), wanted)
            assert len(gathered) == 1
    assert stats(model).blocks_run == 2 * 4 + 2 and len(stats(model).audits) == (2 if audit else 0)
