"""Looks into the first block: up to its attention and no further, whatever the block's arguments, code and copies."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import pytest
import torch
from cases import Case
from original_zoo import HUNYUAN_VIDEO as ORIGINAL_HUNYUAN_VIDEO
from running import generate
from test_signals import TIMES, Noting, recomputed
from torch import Tensor, nn
from zoo import CASES, DIT

import cachekit
from cachekit import Signal
from cachekit.policies import accumulated
from cachekit.preset import Preset


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def tea(threshold: float = 0.3) -> Preset:
    return Preset(accumulated(threshold, pooled=True), segments="all", reuse="residual")


@pytest.mark.parametrize("case", (*CASES, ORIGINAL_HUNYUAN_VIDEO), ids=str)
def test_the_modulated_input_is_found_on_every_architecture(case: Case) -> None:
    """With no word about the block's arguments; every number is finite from the second step on, and falls with the step."""
    wide, narrow = ([980.0, 960.0 - gap, 940.0 - 2 * gap] for gap in (300.0, 0.0))
    found = []
    for times in (wide, narrow):
        seen: list[dict[Signal, tuple[float, ...]]] = []
        watched = Signal("modulated", since="step")
        model = cachekit.wrap(case.build(), Noting((watched,), seen), segments="all", reuse="output")
        with model.cachekit.session(), model.cachekit.branch("only"):
            generate(model, case, times)
        assert not model.cachekit.stats.notes
        assert seen[0][watched][0] == inf and all(0 < step[watched][0] < 3 for step in seen[1:])
        found.append(seen[1][watched][0])
    assert found[1] < found[0]


class Block(nn.Module):
    """Works in its input and returns that, where it is told to, and counts how often it got to its end."""

    def __init__(self, writes: bool, name: str = "attn") -> None:
        super().__init__()
        self.norm, self.mlp, self.writes, self.name, self.finished = nn.LayerNorm(8), nn.Linear(8, 8), writes, name, 0
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x if self.writes else x.clone()
        h.add_(0.1)
        h.add_(self.get_submodule(self.name)(self.norm(h) * (1 + t)))
        self.finished += 1
        return h.add_(self.mlp(h))


class Model(nn.Module):
    def __init__(self, writes: bool = False, name: str = "attn") -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 8), nn.ModuleList([Block(writes, name) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, t / 1000)
        result: Tensor = self.head(h)
        return result


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return Model(**options).eval()


def predictions(model: Any, times: Sequence[float] = TIMES) -> list[Tensor]:
    noise, data = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    with model.cachekit.session(steps=len(times)):
        return [model(noise * (t / 1000) + data * (1 - t / 1000), torch.tensor(t)).clone() for t in times]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_looking_in_writes_nothing_and_runs_no_block_to_its_end() -> None:
    """A block that writes into its input gets a copy of it for the look; its end is reached on full steps only."""
    writing, plain = (cachekit.wrap(small(writes=writes), tea(0.2)) for writes in (True, False))
    assert same(predictions(writing), predictions(plain))
    full = [all(record.recomputed) for record in plain.cachekit.stats.records]
    assert full == [all(record.recomputed) for record in writing.cachekit.stats.records]
    assert 1 < sum(full) < len(TIMES)
    assert [block.finished for block in plain.blocks] == [sum(full)] * 3


class Beside(nn.Module):
    """Three blocks that sum up beside the stream, before their attention."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.blocks = make, nn.ModuleList([BesideBlock() for _ in range(3)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        beside = self.make()
        for block in self.blocks:
            x = block(x, t / 1000, beside)
        total = beside[0] if isinstance(beside, tuple) else beside
        result: Tensor = x + (sum(total) if isinstance(total, list) else sum(total.values()) if isinstance(total, dict) else total)
        return result


class BesideBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, beside: Any) -> Tensor:
        into = beside[0] if isinstance(beside, tuple) else beside
        if isinstance(into, list):
            into.append(x)
        elif isinstance(into, dict):
            into["sum"] = into.get("sum", 0) + x
        else:
            into.add_(x)
        result: Tensor = x + self.attn(x * (1 + t))
        return result


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize(
    "make",
    (list, dict, lambda: torch.zeros(2, 5, 4), lambda: ([],), lambda: [torch.zeros(2, 5, 4)]),
    ids=("list", "dict", "tensor", "nested", "filled"),
)
def test_looking_in_leaves_what_lies_beside_the_stream(make: Callable[[], Any], inference: bool) -> None:
    """Full steps alone: the predictions are those of the model that is not wrapped."""
    model = Beside(make).eval()
    noise, data = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    calls = [(noise * (t / 1000) + data * (1 - t / 1000), torch.tensor(t)) for t in TIMES]
    with torch.inference_mode(inference), torch.no_grad():
        expected = [model(*call) for call in calls]
        cachekit.wrap(model, tea(1e-9), adapter=cachekit.Adapter(timestep="t", range=1000))
        assert same([model(*call) for call in calls], expected)


def test_a_module_of_another_name_is_named_by_the_adapter() -> None:
    expected = predictions(cachekit.wrap(small(), tea(0.2)))
    named = cachekit.wrap(small(name="mix"), tea(0.2), adapter=cachekit.Adapter(modulated=("mix",)))
    assert same(predictions(named), expected)


def test_where_it_is_not_found_every_step_is_full_and_a_note_says_so() -> None:
    """Nothing is reused on a guess."""
    model = cachekit.wrap(small(name="mix"), tea(0.2))
    assert same(predictions(model), predictions(cachekit.wrap(small(name="mix"), "every-1")))
    assert all(all(record.recomputed) for record in model.cachekit.stats.records)
    assert any("attention of block 'blocks.0' could not be seen" in note for note in model.cachekit.stats.notes)


class Raising(Block):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if float(t) < 0.5:
            raise RuntimeError("out of order")
        result: Tensor = super().forward(x, t)
        return result


def test_an_error_on_the_way_there_is_the_models_own() -> None:
    """It comes out as it is, and the next generation looks again."""
    model = small()
    torch.manual_seed(0)
    model.blocks[0] = Raising(writes=False)
    cachekit.wrap(model, tea(0.2))
    with pytest.raises(RuntimeError, match="out of order"):
        predictions(model)
    high = [t for t in TIMES if t >= 500]
    found = predictions(model, high)
    model.cachekit.reset()
    assert same(predictions(model, high), found)
    assert model.blocks[0].finished < 3 * len(high)


@pytest.mark.parametrize("how", ("block.compile()", "torch.compile(block)"))
@pytest.mark.parametrize("first", ("wrap", "compile"))
def test_compiled_blocks_are_looked_into_by_their_own_code(how: str, first: str) -> None:
    """Decisions and predictions are those of blocks that are not compiled."""
    expected = cachekit.wrap(small(), tea(0.2))
    found = predictions(expected)
    model = small()
    if first == "wrap":
        cachekit.wrap(model, tea(0.2))
    for k, block in enumerate(model.blocks):
        if how == "block.compile()":
            block.compile(backend="eager")
        else:
            model.blocks[k] = torch.compile(block, backend="eager")
    if first == "compile" or how == "torch.compile(block)":
        cachekit.wrap(model, tea(0.2))
    assert same(predictions(model), found)
    assert model.cachekit.stats.records == expected.cachekit.stats.records
    assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total and not model.cachekit.stats.notes


def test_unwrap_restores_the_modules_inside_too() -> None:
    model = DIT.build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    recomputed(cachekit.wrap(model, tea()), DIT)
    assert "forward" in model.transformer_blocks[0].attn1.__dict__
    cachekit.unwrap(model)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {name: list(entries) for name, entries in after.items()} == {name: list(entries) for name, entries in before.items()}
    assert "forward" not in model.transformer_blocks[0].attn1.__dict__


def test_nothing_inside_is_touched_where_no_policy_looks_there() -> None:
    model = cachekit.wrap(DIT.build(), "first-block-0.1")
    assert "forward" not in model.transformer_blocks[0].attn1.__dict__


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deepcopy", "pickle"))
def test_copies_look_into_their_own_blocks(copied: Any) -> None:
    original = cachekit.wrap(DIT.build(), tea())
    full = recomputed(original, DIT)
    duplicate = copied(original)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.3)
    scaled = DIT.build()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.3)
    expected = recomputed(cachekit.wrap(scaled, tea()), DIT)
    assert recomputed(duplicate, DIT) == expected
    assert recomputed(original, DIT) == full


def test_threads_look_for_themselves() -> None:
    """One model, two generations of other timesteps at once: each as if alone."""
    schedules = (TIMES, tuple(float(t) for t in range(990, 300, -60)))
    model = cachekit.wrap(small(), tea(0.2))
    expected = [predictions(cachekit.wrap(small(), tea(0.2)), times) for times in schedules]
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                found[k] = predictions(model, schedules[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[k], expected[k]) for k in (0, 1))


def test_a_change_of_shape_in_mid_generation_recomputes() -> None:
    """Another number of tokens: what was seen before is compared with nothing."""
    model = cachekit.wrap(small(), tea(9.0))
    with model.cachekit.session(steps=4), model.cachekit.branch("only"):
        for t, tokens in ((900.0, 5), (800.0, 5), (700.0, 7), (600.0, 7)):
            x = torch.ones(2, tokens, 4) * t / 1000
            model(x, torch.tensor(t))
    assert [all(record.recomputed) for record in model.cachekit.stats.records] == [True, False, True, False]
