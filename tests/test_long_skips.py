"""Properties of added long skip connections, over models, pairs and fusions."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import original_zoo
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TIMES, assert_equal, generate, ran
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from wrapping import identical, snapshot
from zoo import CASES, DIT, FLUX, HUNYUAN_DIT, LATTE, SD3

import cachekit
from cachekit.fusions import Spectral
from cachekit.policies import every, first

ADDABLE = (*CASES, *(case for case in original_zoo.ORIGINALS if case is not original_zoo.HUNYUAN_VIDEO))
QUICK = (DIT, LATTE, FLUX, SD3, original_zoo.LATTE)
all_cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in ADDABLE]
)
some_cases = pytest.mark.parametrize("case", [DIT, LATTE, SD3], ids=str)
fusions = pytest.mark.parametrize("fusion", ["paper", "residual", "spectral"])


class Mean(nn.Module):
    """A fusion of a user's own, with a list inside that is no stack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return (self.layers[0](x) + self.layers[1](skip)) / 2  # type: ignore[no-any-return]


def output(model: nn.Module, case: Case, t: float = 500, **options: Any) -> Tensor:
    return case.output(model(**case.inputs(t, **options)))


def shaken(model: Any, seed: int = 5) -> Any:
    """The same model, with fusions that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.long_skips.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


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
@some_cases
def test_state_dict_round_trip(case: Case, fusion: str) -> None:
    one = shaken(cachekit.add_long_skips(case.build(), fusion=fusion, seed=0))
    other = cachekit.add_long_skips(case.build(seed=1), fusion=fusion, seed=1)
    assert not torch.equal(output(one, case), output(other, case))
    other.load_state_dict(one.state_dict())
    assert torch.equal(output(one, case), output(other, case))


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@some_cases
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


ORDERS = (("add", "wrap"), ("wrap", "add"))
ENDS = (("unwrap", "remove"), ("remove", "unwrap"))


@pytest.mark.parametrize("start", ORDERS, ids=" ".join)
@pytest.mark.parametrize("end", ENDS, ids=" ".join)
@some_cases
def test_wrap_and_add_in_either_order(case: Case, start: tuple[str, str], end: tuple[str, str]) -> None:
    reference = cachekit.add_long_skips(case.build(), fusion="paper", seed=0)
    full = generate(reference, case, TIMES)
    expected = generate(cachekit.wrap(reference, every(2), segments="skip-1"), case, TIMES)
    model = case.build()
    before, plain = snapshot(model), generate(model, case, TIMES)
    does = {
        "add": lambda: cachekit.add_long_skips(model, fusion="paper", seed=0),
        "wrap": lambda: cachekit.wrap(model, every(2), segments="skip-1"),
        "unwrap": lambda: cachekit.unwrap(model),
        "remove": lambda: cachekit.remove_long_skips(model),
    }
    for what in start:
        does[what]()
    assert_equal(generate(model, case, TIMES), expected)
    assert sum(ran(model)) == 2 * case.unit
    does[end[0]]()
    if end[0] == "unwrap":
        assert_equal(generate(model, case, TIMES), full)
    else:
        assert torch.equal(generate(model, case, TIMES)[0], plain[0])
    does[end[1]]()
    assert identical(before, snapshot(model))
    assert_equal(generate(model, case, TIMES), plain)


@all_cases
@pytest.mark.parametrize("segments", ["middle", "all", (1, 3), [(0, 1), (1, 3)]], ids=str)
def test_every_step_full_is_bit_equal(case: Case, segments: Any) -> None:
    model = cachekit.add_long_skips(case.build(), fusion="paper", seed=0)
    expected = generate(model, case, TIMES)
    assert_equal(generate(cachekit.wrap(model, every(1), segments=segments), case, TIMES), expected)


@all_cases
def test_a_recomputed_block_gets_what_a_reused_one_held(case: Case) -> None:
    """The first half reused, the second recomputed: with equal inputs the step equals the stored one."""
    model = cachekit.add_long_skips(case.build(), fusion="paper", seed=0)
    half = len(case.stack) // case.unit // 2
    expected = output(model, case)
    cachekit.wrap(model, first(1), segments=(0, half))
    with model.cachekit.session(), model.cachekit.branch("one"):
        for _ in range(3):
            assert torch.equal(output(model, case), expected)
    assert ran(model) == tuple(k >= half * case.unit for k in range(len(case.stack)))


@all_cases
def test_check_finds_reuse_exact(case: Case) -> None:
    model = shaken(cachekit.add_long_skips(case.build(), seed=0))
    report = cachekit.check(model, **case.inputs(500))
    assert report.ok, report


@pytest.mark.gradients
@fusions
@some_cases
def test_training_reaches_the_fusions(case: Case, fusion: str) -> None:
    model = cachekit.add_long_skips(case.build(), fusion=fusion, seed=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.long_skips.requires_grad_(True)
    before = output(model, case)
    optimiser = torch.optim.AdamW(model.long_skips.parameters(), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        output(model, case).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    grads = [parameter.grad for parameter in model.long_skips.parameters()]
    assert all(grad is not None and bool(grad.any()) for grad in grads)
    assert not torch.equal(output(model, case), before)


@pytest.mark.gradients
@some_cases
def test_gradients_reach_early_blocks_through_the_long_skips(case: Case) -> None:
    """And with checkpointed blocks they are the same; nothing is held when the graph is gone."""
    model = shaken(cachekit.add_long_skips(case.build(), fusion="paper", seed=0))
    model.long_skips["0_to_5" if case.unit == 1 else "0_to_4"].linear.weight.data[:, : model.long_skips.connections[0].width] = 0

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output(model, case).square().sum().backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    early = model.get_submodule(model.long_skips.connections[0].early)
    assert any(bool(parameter.grad.any()) for parameter in early.parameters() if parameter.grad is not None)
    model.train().enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
    for module in model.modules():
        module.training = module is model
    again = gradients()
    assert len(again) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(again, expected, strict=True))
    gc.collect()
    assert len(model.long_skips.passed) == 0


@pytest.mark.gradients
def test_reentrant_checkpointing_is_refused() -> None:
    model = cachekit.add_long_skips(DIT.build().train())
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with pytest.raises(cachekit.ModelError, match="use_reentrant=False"):
        output(model, DIT)


@pytest.mark.gradients
@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([torch.float32, torch.float64]))
def test_the_spectral_bound_holds_while_training(seed: int, bound: float, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    fusion = Spectral(12, bound).to(dtype)
    x, skip, target = torch.randn(3, 4, 5, 12, dtype=dtype)
    optimiser = torch.optim.AdamW(fusion.parameters(), lr=0.3)
    reached = 0.0
    for k in range(12):
        optimiser.zero_grad()
        (fusion(x, skip) - 10 * target).square().mean().backward()
        optimiser.step()
        fusion.train(k % 2 == 0)
        with torch.no_grad():
            fusion(x, skip)
            sigma = float(torch.linalg.matrix_norm(fusion.linear.bounded, 2))
        assert sigma <= bound * (1 + 1e-5)
        reached = max(reached, sigma)
    assert reached > 0.9 * bound


@pytest.mark.gradients
def test_gradients_of_the_spectral_bound() -> None:
    fusion = Spectral(4, 0.5).double()
    nn.init.normal_(fusion.linear.weight)
    x, skip = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = fusion.linear.weight.detach().clone().requires_grad_()

    def run(given: Tensor) -> Any:
        return torch.func.functional_call(fusion, {"linear.weight": given}, (x, skip))

    assert torch.autograd.gradcheck(run, (weight,))


def test_the_spectral_fusion_sees_new_weights_when_sampling() -> None:
    model = shaken(cachekit.add_long_skips(DIT.build(), fusion="spectral", seed=0))
    other = shaken(cachekit.add_long_skips(DIT.build(), fusion="spectral", seed=0), seed=7)
    output(model, DIT)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output(model, DIT), output(other, DIT))
    assert torch.equal(output(model, DIT), output(copy.deepcopy(model), DIT))


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


def test_threads_keep_apart() -> None:
    """One model, several batch sizes at once."""
    model = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    cachekit.wrap(model, every(2), segments="skip-1")
    shapes = {k: 1 + k for k in range(4)}
    expected = {k: [output(model, DIT, t, batch=n, seed=k) for t in TIMES] for k, n in shapes.items() if not model.cachekit.reset()}
    found: dict[int, list[Tensor]] = {}

    def run(k: int) -> None:
        with torch.no_grad():
            found[k] = [output(model, DIT, t, batch=shapes[k], seed=k) for t in TIMES]

    threads = [threading.Thread(target=run, args=(k,)) for k in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in shapes:
        assert_equal(found[k], expected[k])


class Failing(ModelHook):  # type: ignore[misc]
    """Fails before a module runs."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("stop")


def test_what_is_captured_is_released() -> None:
    """At the end of a call, and after an exception; a later call gets nothing of it."""
    model = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    kept: list[weakref.ref[Tensor]] = []
    see = model.transformer_blocks[0].register_forward_hook(lambda module, args, result: kept.append(weakref.ref(result)))
    expected = output(model, DIT)
    add_hook_to_module(model.transformer_blocks[5], Failing())
    with pytest.raises(RuntimeError, match="stop"):
        output(model, DIT, 400)
    remove_hook_from_module(model.transformer_blocks[5])
    see.remove()
    gc.collect()
    assert len(kept) == 2 and all(ref() is None for ref in kept)
    assert model.long_skips.calls.captured is None
    assert torch.equal(output(model, DIT), expected)


def test_hooks_of_others_on_top_stay() -> None:
    model = DIT.build()
    expected = output(model, DIT)
    cachekit.add_long_skips(model, fusion="paper", seed=0)
    fused = output(model, DIT)
    add_hook_to_module(model.transformer_blocks[5], ModelHook())
    assert torch.equal(output(model, DIT), fused)
    cachekit.remove_long_skips(model)
    assert torch.equal(output(model, DIT), expected)
    remove_hook_from_module(model.transformer_blocks[5])
    assert torch.equal(output(model, DIT), expected)


def test_a_hook_on_the_cache_is_refused_and_nothing_changes() -> None:
    model = cachekit.wrap(DIT.build(), every(2))
    add_hook_to_module(model.transformer_blocks[5], ModelHook())
    expected = generate(model, DIT, TIMES)
    with pytest.raises(cachekit.ModelError, match=r"transformer_blocks\.5.*unwrap"):
        cachekit.add_long_skips(model)
    assert "long_skips" not in model._modules
    assert_equal(generate(model, DIT, TIMES), expected)


def test_blocks_out_of_their_model_are_refused() -> None:
    model: Any = cachekit.add_long_skips(original_zoo.DIT.build())
    x, c = torch.randn(2, 16, 24), torch.randn(2, 24)
    model.blocks[0](x, c)
    with pytest.raises(cachekit.ModelError, match=r"'blocks.5'.*outside of a call of the model"):
        model.blocks[5](x, c)
    with pytest.raises(cachekit.ModelError, match="called directly"):
        model.blocks[5].forward(x, c)


def test_an_early_block_that_did_not_run_is_refused() -> None:
    model = cachekit.add_long_skips(LATTE.build())
    with pytest.raises(cachekit.ModelError, match=r"before block 'temporal_transformer_blocks.1' was called"):
        output(model, LATTE, conditioning={**LATTE.conditioning(), "enable_temporal_attentions": False})


def test_mismatches_are_said_at_the_first_call() -> None:
    case = original_zoo.HUNYUAN_VIDEO
    with pytest.raises(cachekit.ModelError, match=r"2_to_4 brings .* give pairs="):
        output(cachekit.add_long_skips(case.build()), case)
    output(cachekit.add_long_skips(case.build(), pairs=[(0, 2), (3, 6)]), case)
    model = cachekit.add_long_skips(DIT.build(), width=8)
    with pytest.raises(cachekit.ModelError, match=r"width 8.*add_long_skips\(model, width=32\)"):
        output(model, DIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, r"fusion='sum'; write one of 'paper', 'residual', 'spectral'"),
        ({"fusion": Mean(3)}, "callable"),
        ({"fusion": lambda width: None}, "callable"),
        ({"pairs": []}, "at least one pair"),
        ({"pairs": [(0, 6)]}, "this stack of 6"),
        ({"pairs": [(3, 3)]}, "the early one comes first"),
        ({"pairs": [(0, 5), (1, 5)]}, "only one for each late block"),
        ({"pairs": 3}, r"list of \(early, late\)"),
        ({"pairs": [(0, 5.0)]}, r"list of \(early, late\)"),
        ({"width": 0}, "whole number above 0"),
        ({"fusion": partial(Spectral, bound=0)}, "above 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = DIT.build()
    before = snapshot(model)
    with pytest.raises(cachekit.ConfigError, match=message):
        cachekit.add_long_skips(model, **options)
    assert identical(before, snapshot(model))


def test_models_that_cannot_take_them_are_refused() -> None:
    with pytest.raises(cachekit.ModelError, match=r"no torch\.nn\.Module"):
        cachekit.add_long_skips(3)  # type: ignore[type-var]
    with pytest.raises(cachekit.ModelError, match="a stack of 0 blocks"):
        cachekit.add_long_skips(nn.Linear(2, 2))
    with pytest.raises(cachekit.ModelError, match="already"):
        cachekit.add_long_skips(cachekit.add_long_skips(DIT.build()))
    outer = nn.ModuleDict({"transformer": cachekit.wrap(DIT.build())})
    with pytest.raises(cachekit.ModelError, match="'transformer' is wrapped"):
        cachekit.add_long_skips(outer)
    taken = DIT.build()
    taken.long_skips = None
    with pytest.raises(cachekit.ModelError, match="attribute 'long_skips' of its own"):
        cachekit.add_long_skips(taken)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_blocks(compiled_first: bool) -> None:
    reference = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    cachekit.wrap(reference, every(2), segments="skip-1")
    model = DIT.build()
    steps: list[Callable[[], Any]] = [
        lambda: [block.compile(backend="eager") for block in model.transformer_blocks],
        lambda: cachekit.add_long_skips(model, fusion="paper", seed=0),
    ]
    for step in steps if compiled_first else steps[::-1]:
        step()
    cachekit.wrap(model, every(2), segments="skip-1")
    assert_equal(generate(model, DIT, TIMES), generate(reference, DIT, TIMES))
    assert ran(model) == ran(reference)


def test_native_and_added_ones_side_by_side() -> None:
    model = shaken(cachekit.add_long_skips(HUNYUAN_DIT.build(), pairs=[(0, 3)]))
    found = cachekit.graph(model, **HUNYUAN_DIT.inputs(500))
    assert set(found.long_skips) == {(0, 3), *HUNYUAN_DIT.long_skips}
