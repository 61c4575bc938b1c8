"""``cachekit.graph``: what it shows of models, what it counts, how it prints, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, DIT, FLUX, HUNYUAN_DIT, LATTE, SD3, WAN

import cachekit
from cachekit.tree import get, pick

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Part(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y if skip is None else y + skip


class Two(nn.Module):
    """Two streams, an output in addition, and a tensor that is handed back untouched."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor, *, mask: Tensor) -> dict[str, Any]:
        return {"c": c + 1, "rest": (self.inner(x), x.sum(), mask)}


class Walk(nn.Module):
    """Calls its blocks in a given order; between some of them it does something to the stream."""

    def __init__(self, order: list[int], broken: frozenset[int] = frozenset(), skips: dict[int, int] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Part() for _ in range(max(order) + 1))
        self.order, self.broken, self.skips = order, broken, skips or {}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for v, k in enumerate(self.order):
            x = x * 2 if v in self.broken else x
            x = self.blocks[k](x, outputs[self.skips[v]]) if v in self.skips else self.blocks[k](x)
            outputs.append(x)
        return x


X, T = torch.ones(2, 3, 4), torch.tensor(5.0)


def of(model: nn.Module) -> cachekit.Graph:
    return cachekit.graph(model, X, T)


def test_a_chain() -> None:
    found = of(Walk([0, 1, 2]))
    assert found.chains == ((0, 1, 2),)
    assert found.long_skips == ()
    assert [visit.block for visit in found.visits] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {visit.kind for visit in found.visits} == {"Part"}
    assert [visit.streams for visit in found.visits] == [(((0,), ()),)] * 3
    assert [visit.linked for visit in found.visits] == [None, "same", "same"]
    assert found.visits[0].signatures == (((2, 3, 4), torch.float32, torch.device("cpu")),)


def test_what_the_model_does_in_between_ends_a_chain() -> None:
    assert of(Walk([0, 1, 2, 3, 4], broken=frozenset({0, 2, 3}))).chains == ((0, 1), (2,), (3, 4))


def test_a_block_that_is_called_twice_has_two_visits() -> None:
    found = of(Walk([0, 1, 0, 1, 1]))
    assert [visit.block for visit in found.visits] == ["blocks.0", "blocks.1", "blocks.0", "blocks.1", "blocks.1"]
    assert found.chains == ((0, 1, 2, 3, 4),)


def test_long_skip_connections() -> None:
    found = of(Walk([0, 1, 2, 3], skips={2: 0, 3: 0}))
    assert found.long_skips == ((0, 2), (0, 3))
    assert found.chains == ((0, 1, 2, 3),)
    # One that starts beyond a broken link is found too.
    assert of(Walk([0, 1, 2, 3], broken=frozenset({1, 2}), skips={3: 0})).long_skips == ((0, 3),)


def test_streams_extras_and_what_passes_through() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Two(), Two()])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            c, mask = torch.zeros(2, 5, 4), torch.ones(2, 3)
            for layer in self.layers:
                result = layer(x, c, mask=mask)
                c, (x, _, mask) = result["c"], result["rest"]
            return x + c.mean()

    found = of(Model())
    assert found.chains == ((0, 1),)
    for visit in found.visits:
        assert set(visit.streams) == {((0,), ("rest", 0)), ((1,), ("c",))}
        assert visit.extras == (("rest", 1),)
        assert visit.passes == ((("mask",), ("rest", 2)),)
    assert "argument 0, argument 1" in str(found)


def _count(case: Case) -> tuple[cachekit.Graph, list[tuple[int, int]]]:
    """The graph, and (parameters, FLOPs) of each visit counted on the block alone, with attention in plain matrix products."""
    model, inputs = case.build(), case.inputs(500.0)
    found = cachekit.graph(model, **inputs)
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda block, args, kwargs: calls.append((block, args, kwargs)), with_kwargs=True
        )
        for path in dict.fromkeys(visit.block for visit in found.visits)
    ]
    with torch.no_grad():
        model(**inputs)
        for handle in handles:
            handle.remove()
        counts = []
        for block, args, kwargs in calls:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                block(*args, **kwargs)
            counts.append((parameters_to_vector(block.parameters()).numel(), counter.get_total_flops()))
    return found, counts


@every_case
def test_costs_equal_those_of_each_block_alone(case: Case) -> None:
    found, counts = _count(case)
    assert len(found.costs) == len(found.visits) == len(counts)
    for cost, (parameters, flops) in zip(found.costs, counts, strict=True):
        assert (cost.parameters, cost.flops) == (parameters, flops)
        assert parameters > 0 and flops > 0


def test_costs_equal_the_formula() -> None:
    # A Wan block on 2 x 48 tokens of width 24, 6 prompt tokens, hidden width 48; two FLOPs for a multiplication and an addition.
    model = WAN.build()
    found = cachekit.graph(model, **WAN.inputs(500.0))
    batch, tokens, prompt, width, hidden = 2, 3 * 4 * 4, 6, 24, 48
    own = 4 * 2 * batch * tokens * width**2 + 2 * 2 * batch * tokens**2 * width
    cross = 2 * 2 * batch * (tokens + prompt) * width**2 + 2 * 2 * batch * tokens * prompt * width
    mlp = 2 * 2 * batch * tokens * width * hidden
    assert {cost.flops for cost in found.costs} == {own + cross + mlp}
    assert all(
        cost.parameters == sum(p.numel() for p in model.get_submodule(visit.block).parameters())
        for cost, visit in zip(found.costs, found.visits, strict=True)
    )


def test_fused_blocks_cost_more() -> None:
    found = cachekit.graph(HUNYUAN_DIT.build(), **HUNYUAN_DIT.inputs(500.0))
    late = {late for _, late in found.long_skips}
    width, tokens = 32, 2 * 16
    plain, fused = found.costs[0], found.costs[max(late)]
    assert all((found.costs[v] == fused) == (v in late) for v in found.blocks)
    # The long skip is fused by a norm and a linear layer of 2D -> D.
    assert fused.flops - plain.flops == 2 * tokens * 2 * width * width
    assert fused.parameters - plain.parameters == 2 * width * width + width + 2 * (2 * width)


def test_two_streams_run_from_double_to_single_blocks() -> None:
    found = cachekit.graph(FLUX.build(), **FLUX.inputs(500.0))
    kinds = [visit.kind for visit in found.visits]
    assert kinds == ["FluxTransformerBlock"] * 3 + ["FluxSingleTransformerBlock"] * 4
    assert found.visits[3].linked == "same"
    for visit in found.visits:
        # Blocks return (context, sample), though they take (sample, context).
        assert set(visit.streams) == {(("hidden_states",), (1,)), (("encoder_hidden_states",), (0,))}


def test_a_stream_may_end_before_the_last_block() -> None:
    found = cachekit.graph(SD3.build(), **SD3.inputs(500.0))
    assert [len(visit.streams) for visit in found.visits] == [2, 2, 2, 2, 2, 1]
    assert found.long_skips == ()


def test_it_says_what_blocks_really_do() -> None:
    """Along a chain each stream's output is the next block's input: replayed on the block's recorded arguments."""
    model = HUNYUAN_DIT.build()
    inputs = HUNYUAN_DIT.inputs(500.0)
    found = cachekit.graph(model, **inputs)
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    for visit in found.visits:
        model.get_submodule(visit.block).register_forward_hook(
            lambda block, args, kwargs, result: seen.append((args, kwargs, result)), with_kwargs=True
        )
    with torch.no_grad():
        model(**inputs)
    for v, visit in enumerate(found.visits):
        args, kwargs, _ = seen[v]
        for path, output in visit.links:
            assert pick(args, kwargs, path) is get(seen[v - 1][2], output)
        for source in visit.sources:
            assert pick(args, kwargs, source.path) is get(seen[source.visit][2], source.output)
    assert sum(len(visit.sources) for visit in found.visits) == len(found.long_skips) == 3


def test_printed() -> None:
    lines = str(of(Walk([0, 1, 2, 0], broken=frozenset({2}), skips={3: 0}))).splitlines()
    assert [line.split() for line in lines] == [
        ["block", "class", "chain", "streams", "long", "skip", "from", "parameters", "flops"],
        ["blocks.0", "Part", "starts", "0", "argument", "0", "20", "192"],
        ["blocks.1", "Part", "0", "argument", "0", "20", "192"],
        ["blocks.2", "Part", "starts", "1", "argument", "0", "20", "192"],
        ["blocks.0", "Part", "1", "argument", "0", "blocks.0", "20", "192"],
        ["4", "blocks", "in", "2", "chains,", "1", "long", "skip", "connections"],
    ]
    columns = {line.index("20  ") for line in lines[1:-1]}
    assert len(columns) == 1, "columns are aligned"


@every_case
def test_printed_models(case: Case) -> None:
    found = cachekit.graph(case.build(), **case.inputs(500.0))
    lines = str(found).splitlines()
    assert len(lines) == len(found.visits) + 2
    for line, visit, cost in zip(lines[1:], found.visits, found.costs, strict=False):
        assert line.startswith(f"{visit.block} ")
        assert f"{cost.parameters:,}" in line
    assert lines[-1] == f"{len(case.stack)} blocks in {len(found.chains)} chains, {len(case.long_skips)} long skip connections"
    assert ("relayout" in str(found)) == (case is LATTE)


@every_case
def test_it_leaves_the_model_as_it_was(case: Case) -> None:
    model, inputs = case.build(), case.inputs(500.0)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    cachekit.graph(model, **inputs)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert list(old) == list(after[name])
        assert all(after[name][key] is old[key] for key in old)


def test_also_where_the_call_raises() -> None:
    model = DIT.build()
    inputs = DIT.inputs(500.0)
    with pytest.raises(TypeError):
        cachekit.graph(model, **{**inputs, "unheard_of": 1})
    broken = Walk([0, 1])
    broken.blocks[1].inner = nn.Linear(7, 7)
    with pytest.raises(RuntimeError):
        of(broken)
    assert not any("forward" in module.__dict__ for each in (model, broken) for module in each.modules())


def test_a_wrapped_model_shows_the_same_graph_and_keeps_its_cache() -> None:
    plain = cachekit.graph(DIT.build(), **DIT.inputs(500.0))
    model = cachekit.wrap(DIT.build(), "every-2")
    conditioning = DIT.conditioning()
    with torch.no_grad():
        model(**DIT.inputs(900.0, conditioning=conditioning))
        held = model.cachekit.stats.bytes_held
        assert cachekit.graph(model, **DIT.inputs(500.0)) == plain
        model(**DIT.inputs(850.0, conditioning=conditioning))
    assert model.cachekit.stats.steps == 2
    assert model.cachekit.stats.bytes_held == held > 0
    assert model.cachekit.stats.records[1].recomputed == (True, False, False, False, False, True)


def test_the_blocks_that_an_adapter_names() -> None:
    adapter = cachekit.Adapter(stack=r"single_transformer_blocks\.\d+")
    found = cachekit.graph(FLUX.build(), adapter=adapter, **FLUX.inputs(500.0))
    assert [visit.block for visit in found.visits] == [f"single_transformer_blocks.{k}" for k in range(4)]


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(cachekit.ModelError, match="no block of Linear was called"):
        cachekit.graph(nn.Linear(4, 4), X)
    with pytest.raises(cachekit.ModelError, match=r"object is no torch\.nn\.Module; give the transformer itself"):
        cachekit.graph(object())  # type: ignore[arg-type]
