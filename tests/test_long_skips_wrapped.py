"""Added long skip connections in wrapped, compiled and hooked models, in threads, and after exceptions."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from adding import all_cases, output, shaken, some_cases
from cases import Case
from running import TIMES, assert_equal, generate, ran
from torch import Tensor, nn
from wrapping import identical, snapshot
from zoo import DIT, SD3

import cachekit
from cachekit.policies import every, first


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("fusion", ["paper", "residual"])
def test_a_model_compiled_as_a_whole_is_one_graph(fusion: str, mode: Callable[[], Any]) -> None:
    """Nothing that carries or fuses a long skip breaks it, and a second call doesn't compile it again."""
    torch._dynamo.reset()
    model = shaken(cachekit.add_long_skips(SD3.build(), fusion=fusion, seed=0))
    expected = [output(model, SD3, t) for t in (500, 400)]
    model.compile(backend="eager", fullgraph=True)
    with mode(), torch._dynamo.config.patch(error_on_recompile=True):
        found = [output(model, SD3, t) for t in (500, 400)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_compiled_blocks_are_reused_in_pairs() -> None:
    """The cache stands before a compiled block with its hooks, so that none sees what a reused one returns."""
    model = cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    cachekit.wrap(model, every(2), segments=(0, 3))
    with pytest.raises(cachekit.ModelError, match="compiled, segments= that reuse both or neither"):
        generate(model, DIT, TIMES)


def test_hooks_of_others_beneath() -> None:
    """Accelerate's own forward lies beneath the fusion, and comes back when the fusion goes."""
    model, plain = DIT.build(), cachekit.add_long_skips(DIT.build(), fusion="paper", seed=0)
    for path in ("", "transformer_blocks.0", "transformer_blocks.5"):
        add_hook_to_module(model.get_submodule(path), ModelHook())
    before = snapshot(model)
    cachekit.add_long_skips(model, fusion="paper", seed=0)
    expected = generate(plain, DIT, TIMES)
    assert_equal(generate(model, DIT, TIMES), expected)
    assert_equal(generate(cachekit.wrap(model, every(1)), DIT, TIMES), expected)
    cachekit.unwrap(cachekit.remove_long_skips(model))
    assert identical(before, snapshot(model))


@pytest.mark.parametrize("added_first", [True, False])
@pytest.mark.parametrize("fusion", ["paper", "residual", "spectral"])
def test_weights_that_are_offloaded(fusion: str, added_first: bool) -> None:
    """Accelerate keeps them elsewhere between two calls; fusions that come later stay where they are made."""
    plain = cachekit.add_long_skips(SD3.build(), fusion=fusion, seed=0)
    expected = generate(plain, SD3, TIMES)
    model = SD3.build()
    if added_first:
        cachekit.add_long_skips(model, fusion=fusion, seed=0)
    cpu_offload(model, execution_device="cpu")
    if not added_first:
        assert next(model.transformer_blocks[5].parameters()).is_meta
        cachekit.add_long_skips(model, fusion=fusion, seed=0)
    assert_equal(generate(model, SD3, TIMES), expected)
    cached = generate(cachekit.wrap(plain, every(2), segments="skip-1"), SD3, TIMES)
    assert_equal(generate(cachekit.wrap(model, every(2), segments="skip-1"), SD3, TIMES), cached)


@pytest.mark.parametrize("fusion", ["paper", "spectral"])
def test_inference_mode(fusion: str) -> None:
    model = shaken(cachekit.add_long_skips(DIT.build(), fusion=fusion, seed=0))
    cachekit.wrap(model, every(2), segments="skip-1")
    expected = generate(model, DIT, TIMES)
    with torch.inference_mode():
        assert_equal(generate(model, DIT, TIMES), expected)
    assert_equal(generate(model, DIT, TIMES), expected)
