"""Properties of added long skip connections, over models, pairs and fusions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import original_zoo
import pytest
import torch
from adding import Mean, all_cases, fusions, output, shaken
from cases import Case
from hypothesis import given
from hypothesis import strategies as st
from running import TIMES, assert_equal, generate
from torch import Tensor, nn
from wrapping import identical, snapshot
from zoo import DIT, HUNYUAN_DIT

import cachekit
from cachekit.policies import every


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


@all_cases
@pytest.mark.parametrize("fusion", ["residual", "spectral"])
def test_insertion_changes_nothing(case: Case, fusion: str) -> None:
    model = case.build()
    expected = output(model, case)
    assert cachekit.add_long_skips(model, fusion=fusion) is model
    assert torch.equal(output(model, case), expected)
    assert not torch.equal(output(shaken(model), case), expected)


@all_cases
def test_the_graph_shows_them(case: Case) -> None:
    model = cachekit.add_long_skips(case.build())
    found = cachekit.graph(model, **case.inputs(500))
    units = len(case.stack) // case.unit
    blocks = [found.visits[v].block for v in found.blocks]
    assert tuple(blocks) == case.stack
    first_half = [(case.unit * (i + 1) - 1, case.unit * (units - 1 - i)) for i in range(units // 2)]
    assert set(found.long_skips) == {*first_half, *case.long_skips}
    assert f"{len(found.long_skips)} long skip connections" in str(found)


pairs = st.integers(1, 5).flatmap(lambda late: st.tuples(st.integers(0, late - 1), st.just(late)))
FUSIONS: list[Any] = ["paper", "residual", "spectral", Mean]


@given(st.lists(pairs, min_size=1, max_size=4, unique_by=lambda pair: pair[1]), st.sampled_from(FUSIONS))
def test_any_pairs_equal_a_written_out_loop(chosen: list[tuple[int, int]], fusion: Any) -> None:
    case = original_zoo.DIT
    model, plain = shaken(cachekit.add_long_skips(case.build(), fusion=fusion, pairs=chosen, seed=0)), case.build()
    inputs = case.inputs(500)
    x = plain.x_embedder(inputs["x"])
    outputs: list[Tensor] = []
    c = plain.t_embedder(inputs["t"]) + plain.y_embedder(inputs["y"])
    sources = {late: early for early, late in chosen}
    for i, block in enumerate(plain.blocks):
        if i in sources:
            x = model.long_skips[f"{sources[i]}_to_{i}"](x, outputs[sources[i]])
        x = block(x, c)
        outputs.append(x)
    with watched(model.final_layer) as seen:
        model(**inputs)
    assert torch.equal(seen[0], x)


class watched:
    """Collects what enters a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.seen = module, list[Tensor]()

    def _see(self, module: nn.Module, args: Any) -> None:
        self.seen.append(args[0])

    def __enter__(self) -> list[Tensor]:
        self.handle = self.module.register_forward_pre_hook(self._see)
        return self.seen

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()


@fusions
@all_cases
def test_they_are_one_submodule_and_every_other_key_stays(case: Case, fusion: str) -> None:
    model = case.build()
    keys, values = list(model.state_dict()), [value.clone() for value in model.state_dict().values()]
    cachekit.add_long_skips(model, fusion=fusion)
    state = model.state_dict()
    assert [key for key in state if not key.startswith("long_skips.")] == keys
    assert all(torch.equal(state[key], value) for key, value in zip(keys, values, strict=True))
    names = {key.removeprefix("long_skips.") for key in state} - set(keys)
    wanted = {f"{early}_to_{late}" for early, late in model.long_skips.pairs}
    assert names == {f"{name}.{part}.{kind}" for name in wanted for part in ("norm", "linear") for kind in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in model.long_skips.parameters())


@fusions
@all_cases
def test_state_dict_round_trip(case: Case, fusion: str) -> None:
    one = shaken(cachekit.add_long_skips(case.build(), fusion=fusion, seed=0))
    other = cachekit.add_long_skips(case.build(seed=1), fusion=fusion, seed=1)
    for name, buffer in other.named_buffers():
        buffer.copy_(one.get_buffer(name))  # some are drawn by the stand-ins and kept out of state dicts
    assert not torch.equal(output(one, case), output(other, case))
    other.load_state_dict(one.state_dict())
    assert torch.equal(output(one, case), output(other, case))


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@all_cases
def test_a_copy_uses_its_own_weights(case: Case, copied: Callable[[Any], Any], wrapped: bool) -> None:
    model = shaken(cachekit.add_long_skips(case.build(), fusion="spectral", seed=0))
    if wrapped:
        cachekit.wrap(model, every(2), segments="skip-1")
    expected = generate(model, case, TIMES)
    other = copied(model)
    assert_equal(generate(other, case, TIMES), expected)
    shaken(other, seed=6)
    assert not torch.equal(output(other, case, 100), output(model, case, 100))
    assert_equal(generate(model, case, TIMES), expected)
    cachekit.unwrap(cachekit.remove_long_skips(other))
    assert torch.equal(output(other, case), output(case.build(), case))
    assert_equal(generate(model, case, TIMES), expected)


@all_cases
def test_remove_restores_every_dict(case: Case) -> None:
    model = case.build()
    before = snapshot(model)
    cachekit.add_long_skips(model, fusion="paper")
    output(model, case)
    assert cachekit.remove_long_skips(model) is model
    assert identical(before, snapshot(model))
    assert cachekit.remove_long_skips(model) is model


@fusions
def test_a_seed_makes_the_same_weights_and_leaves_the_generator_alone(fusion: str) -> None:
    one = cachekit.add_long_skips(DIT.build(), fusion=fusion, seed=3)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    two = cachekit.add_long_skips(DIT.build(), fusion=fusion, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    three = cachekit.add_long_skips(DIT.build(), fusion=fusion, seed=4)
    same = [torch.equal(a, b) for a, b in zip(one.long_skips.parameters(), three.long_skips.parameters(), strict=True)]
    assert all(same) == (fusion != "paper")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    for model in (cachekit.add_long_skips(DIT.build(), fusion="paper").to(dtype), cachekit.add_long_skips(DIT.build().to(dtype))):
        assert {parameter.dtype for parameter in model.long_skips.parameters()} == {dtype}
        assert output(model, DIT, dtype=dtype).dtype == dtype


def test_native_and_added_ones_side_by_side() -> None:
    model = shaken(cachekit.add_long_skips(HUNYUAN_DIT.build(), pairs=[(0, 3)]))
    found = cachekit.graph(model, **HUNYUAN_DIT.inputs(500))
    assert set(found.long_skips) == {(0, 3), *HUNYUAN_DIT.long_skips}
