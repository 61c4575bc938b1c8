"""torch.compile of blocks, before and after wrap: the decision stays outside the compiled code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case
from original_zoo import DIT, HUNYUAN_DIT, HUNYUAN_VIDEO
from running import SCHEDULE, assert_equal, generate
from torch import Tensor, fx, nn
from zoo import FLUX

import cachekit
from cachekit.policies import every

PLANNED = [i % 2 == 0 for i in range(len(SCHEDULE))]

SLOW = (HUNYUAN_DIT, HUNYUAN_VIDEO, FLUX)
cases = pytest.mark.parametrize("case", [DIT, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)


class Backend:
    """Runs a graph as it is; counts how many it was given, and how often they ran."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.runs = 0

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compile_blocks(model: nn.Module, case: Case, backend: Any) -> None:
    """In place, as ``block.compile()``."""
    for path in case.stack:
        model.get_submodule(path).compile(backend=backend, fullgraph=True)


def replace_blocks(model: nn.Module, case: Case, backend: Any) -> None:
    """Put what ``torch.compile(block)`` returns in the block's place."""
    for path in case.stack:
        parent, _, name = path.rpartition(".")
        compiled = torch.compile(model.get_submodule(path), backend=backend, fullgraph=True)
        model.get_submodule(parent)[int(name)] = compiled  # type: ignore[operator]


WAYS = (compile_blocks, replace_blocks)
# model.compile() and torch.compile(model)
BY = ("method", pytest.param("function", marks=pytest.mark.slow))


@cases
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
def test_compiled_blocks(case: Case, way: Callable[[nn.Module, Case, Any], None], order: str) -> None:
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model, backend = case.build(), Backend()
    if order == "after wrap":
        cachekit.wrap(model, every(2))
    way(model, case, backend)
    if order == "before wrap":
        cachekit.wrap(model, every(2))
    found = generate(model, case, SCHEDULE[:1])
    compiled = len(backend.graphs)
    # fullgraph would have raised where something of ours broke a block's graph; as it is, each run is one block.
    assert 0 < compiled <= len(case.stack) == backend.runs
    found += generate(model, case, SCHEDULE[1:], start=SCHEDULE[0])
    assert_equal(found, expected)
    # No step, recomputed or reused, compiled anything again.
    assert len(backend.graphs) == compiled
    records = model.cachekit.stats.records
    assert [all(record.recomputed) for record in records] == PLANNED
    # The code of a reused block was not entered.
    assert backend.runs == sum(sum(record.recomputed) for record in records) == model.cachekit.stats.blocks_run
    assert not model.cachekit.stats.dropped and not model.cachekit.stats.notes


@pytest.mark.parametrize("way", WAYS)
def test_graphs_hold_the_blocks_alone(way: Callable[[nn.Module, Case, Any], None]) -> None:
    plain, wrapped = Backend(), Backend()
    for backend, policy in ((plain, None), (wrapped, every(2))):
        torch._dynamo.reset()
        model = DIT.build()
        if policy is not None:
            cachekit.wrap(model, policy)
        way(model, DIT, backend)
        generate(model, DIT, SCHEDULE)
    operations = [
        [[(node.op, str(node.target)) for node in graph.graph.nodes if node.op.startswith("call")] for graph in backend.graphs]
        for backend in (plain, wrapped)
    ]
    assert operations[0] == operations[1]
    assert len(operations[0]) == 1 and len(operations[0][0]) > 10


@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
def test_unwrap_leaves_the_compiled_code(order: str) -> None:
    model, backend = DIT.build(), Backend()
    expected = generate(model, DIT, SCHEDULE)
    if order == "after wrap":
        before = {path: set(module.__dict__) | {"_compiled_call_impl"} for path, module in model.blocks.named_children()}
        cachekit.wrap(model, every(2))
        compile_blocks(model, DIT, backend)
    else:
        compile_blocks(model, DIT, backend)
        before = {path: set(module.__dict__) for path, module in model.blocks.named_children()}
        originals = [block._compiled_call_impl for block in model.blocks]
        cachekit.wrap(model, every(2))
    generate(model, DIT, SCHEDULE)
    cachekit.unwrap(model)
    assert {path: set(module.__dict__) for path, module in model.blocks.named_children()} == before
    if order == "before wrap":
        assert [block._compiled_call_impl for block in model.blocks] == originals
    runs = backend.runs
    assert_equal(generate(model, DIT, SCHEDULE), expected)
    assert backend.runs == runs + len(SCHEDULE) * len(DIT.stack)


def test_blocks_compiled_in_the_middle_of_a_generation() -> None:
    """What changes under a generation that is under way is noticed: one full step, and on from there."""
    model, backend = cachekit.wrap(DIT.build(), every(2)), Backend()
    uncached = generate(DIT.build(), DIT, SCHEDULE)
    generate(model, DIT, SCHEDULE[:3])
    compile_blocks(model, DIT, backend)
    found = generate(model, DIT, SCHEDULE[3:], start=SCHEDULE[0])
    full = [all(record.recomputed) for record in model.cachekit.stats.records]
    assert full == [True, False, True, True, True, False, True]
    assert torch.equal(found[0], uncached[3])
    assert sum(model.cachekit.stats.dropped.values()) == 1


def test_blocks_may_be_compiled_anew() -> None:
    expected = generate(cachekit.wrap(DIT.build(), every(2)), DIT, SCHEDULE)
    model, old, new = cachekit.wrap(DIT.build(), every(2)), Backend(), Backend()
    compile_blocks(model, DIT, old)
    generate(model, DIT, SCHEDULE)
    compile_blocks(model, DIT, new)
    runs = old.runs
    model.cachekit.reset()
    assert_equal(generate(model, DIT, SCHEDULE), expected)
    assert (old.runs, new.runs) == (runs, model.cachekit.stats.blocks_run)
    assert [all(record.recomputed) for record in model.cachekit.stats.records] == PLANNED
    compiled = [block._compiled_call_impl for block in cachekit.unwrap(model).blocks]
    generate(model, DIT, SCHEDULE[:1])
    assert new.runs == runs + len(DIT.stack)
    assert all(callable(code) for code in compiled)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
def test_copies_of_a_model_with_compiled_blocks(duplicate: Callable[[Any], Any], order: str) -> None:
    """A copy of a compiled module is not compiled; it may be compiled again."""
    expected = generate(cachekit.wrap(DIT.build(), every(2)), DIT, SCHEDULE)
    model, backend, own = DIT.build(), Backend(), Backend()
    if order == "after wrap":
        cachekit.wrap(model, every(2))
    compile_blocks(model, DIT, backend)
    if order == "before wrap":
        cachekit.wrap(model, every(2))
    generate(model, DIT, SCHEDULE[:3])
    twin, runs = duplicate(model), backend.runs
    assert_equal(generate(twin, DIT, SCHEDULE), expected)
    compile_blocks(twin, DIT, own)
    twin.cachekit.reset()
    twin.blocks[0].mlp.fc1.weight.mul_(2.0)
    changed = generate(twin, DIT, SCHEDULE)
    assert not torch.equal(changed[0], expected[0])
    assert own.runs == twin.cachekit.stats.blocks_run < twin.cachekit.stats.blocks_total
    assert backend.runs == runs
    assert_equal(generate(cachekit.unwrap(twin), DIT, SCHEDULE[:1]), changed[:1])
    assert_equal(generate(model, DIT, SCHEDULE), expected)


@pytest.mark.parametrize("by", BY)
def test_a_compiled_model_is_not_cached_and_says_so(by: str) -> None:
    expected = generate(DIT.build(), DIT, SCHEDULE)
    model, backend = DIT.build(), Backend()
    if by == "method":
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    cachekit.wrap(model, every(2))
    assert_equal(generate(model, DIT, SCHEDULE), expected)
    assert len(backend.graphs) == 1 and backend.runs == len(SCHEDULE)
    assert any("compile the blocks" in note and "segments='model'" in note for note in model.cachekit.stats.notes)


@pytest.mark.parametrize("by", BY)
def test_a_model_compiled_as_a_whole_after_wrap(by: str) -> None:
    expected = generate(DIT.build(), DIT, SCHEDULE)
    model, backend = cachekit.wrap(DIT.build(), every(2)), Backend()
    compiled = model
    if by == "method":
        model.compile(backend=backend, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_equal(generate(compiled, DIT, SCHEDULE), expected)
    assert len(backend.graphs) == 1 and backend.runs == len(SCHEDULE)
    assert any("compile" in note and "blocks" in note for note in model.cachekit.stats.notes)


@pytest.mark.parametrize("by", BY)
def test_the_prediction_of_a_compiled_model_is_a_site(by: str) -> None:
    expected = generate(cachekit.wrap(DIT.build(), every(2), segments="model"), DIT, SCHEDULE)
    model, backend = DIT.build(), Backend()
    if by == "method":
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    cachekit.wrap(model, every(2), segments="model")
    found: list[Tensor] = generate(model, DIT, SCHEDULE)
    assert_equal(found, expected)
    assert len(backend.graphs) == 1 and backend.runs == sum(PLANNED)
    assert not model.cachekit.stats.notes
