"""The exactness properties on small diffusers transformers with random weights."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, HUNYUAN_DIT, LATTE, Case, Shape

import cachekit
from cachekit.policies import every, first

TIMES = (900.0, 700.0, 500.0, 300.0)
SCHEDULE = tuple(float(t) for t in range(950, 0, -100))
SEGMENTS: tuple[Any, ...] = ("middle", "all", (1, 3), "model")
BEGINNINGS: tuple[dict[str, Any], ...] = (
    {"policy": "skip-every-2"},
    {"policy": "every-5", "segments": "all"},
    {"policy": "N2-700-50", "reuse": "taylor-2"},
    {"policy": "change-0.1", "reuse": "residual"},
    {"policy": "first-1", "segments": "model", "reuse": "taylor-1"},
    {"policy": "at-most-3", "segments": [(0, 2), (3, 4)], "reuse": "residual-taylor-1"},
)

cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


def generate(model: nn.Module, case: Case, times: Sequence[float], seed: int = 0, shape: Shape | None = None) -> list[Tensor]:
    """The predictions of one generation over samples that don't depend on the model, with one conditioning throughout."""
    shape = shape or Shape()
    conditioning = case.conditioning(seed, shape)
    return [
        case.output(model(**case.inputs(t, shape.batch, seed, shape.dtype, shape.scale, conditioning))).clone() for t in times
    ]


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Bit-equality, step by step."""
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"step {step} differs by up to {(a - b).abs().max()}"


def segment_paths(case: Case, segment: Any) -> tuple[str, ...]:
    """The blocks that a segment covers, counted here by hand: Latte's in pairs."""
    unit = 2 if case is LATTE else 1
    ranges = {"middle": (1, len(case.stack) // unit - 1), "all": (0, len(case.stack)), "model": (0, len(case.stack))}
    start, stop = ranges[segment] if isinstance(segment, str) else segment
    return case.stack[start * unit : stop * unit]


def _counted(calls: Counter[str], path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    calls[path] += 1
    return original(*args, **kwargs)


def count_forwards(model: nn.Module, case: Case) -> Counter[str]:
    """Count the calls of every block's own forward; to be called before wrap."""
    calls: Counter[str] = Counter()
    for path in case.stack:
        block = model.get_submodule(path)
        block.__dict__["forward"] = functools.partial(_counted, calls, path, block.forward)
    return calls


@contextmanager
def watching(model: nn.Module, paths: Sequence[str], seen: list[tuple[str, Any, Any]]) -> Iterator[None]:
    """Collect (path, inputs, result) of these blocks, as the model passes and gets them."""

    def see(path: str, block: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        results = result if isinstance(result, tuple) else (result,)
        seen.append((path, tensors, [value.clone() for value in results if isinstance(value, Tensor)]))

    hooks = [
        model.get_submodule(path).register_forward_hook(functools.partial(see, path), with_kwargs=True) for path in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@cases
def test_every_1_equals_the_unwrapped_model(case: Case) -> None:
    expected = generate(case.build(), case, TIMES)
    model = cachekit.wrap(case.build(), every(1))
    assert_equal(generate(model, case, TIMES), expected)
    assert model.cachekit.stats.blocks_run == model.cachekit.stats.blocks_total == len(TIMES) * len(case.stack)


@cases
@pytest.mark.parametrize("arguments", BEGINNINGS, ids=lambda arguments: str(arguments["policy"]))
def test_the_first_step_is_exact_under_any_policy(case: Case, arguments: dict[str, Any]) -> None:
    plain, model = case.build(), cachekit.wrap(case.build(), **arguments)
    for seed in (0, 1):
        # More steps in between, so that the second generation starts over something stored.
        assert_equal(generate(model, case, TIMES, seed)[:1], generate(plain, case, TIMES[:1], seed))
    assert model.cachekit.stats.generations == 2


@cases
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
@pytest.mark.parametrize("reuse", ["output", "taylor-2"])
def test_equal_inputs_give_the_same_output(case: Case, segments: Any, reuse: str) -> None:
    model = cachekit.wrap(case.build(), first(3), segments=segments, reuse=reuse)
    with model.cachekit.branch("a"):
        stored = generate(model, case, TIMES[:3])[-1]
        again = generate(model, case, TIMES[2:3])[0]
    assert torch.equal(again, stored)
    # Else it would only have been computed again.
    covered = segment_paths(case, segments)
    assert model.cachekit.stats.records[-1].recomputed == tuple(path not in covered for path in case.stack)


@cases
@pytest.mark.parametrize("reuse", ["residual", "residual-taylor-2"])
def test_equal_inputs_with_residual_reuse_are_equal_up_to_rounding(case: Case, reuse: str) -> None:
    model = cachekit.wrap(case.build(), first(3), reuse=reuse)
    full: list[tuple[str, Any, Any]] = []
    reused: list[tuple[str, Any, Any]] = []
    last = case.stack[-1:]
    with model.cachekit.branch("a"):
        generate(model, case, TIMES[:2])
        with watching(model, case.stack, full):
            expected = generate(model, case, TIMES[2:3])[0]
        with watching(model, last, reused):
            again = generate(model, case, TIMES[2:3])[0]
    # x + (y - x) rounds twice: off by at most eps * (|x| + |y|), once for each stretch that has a residual of its own.
    peak = max(float(value.abs().max()) for _, inputs, results in full for value in (*inputs, *results))
    stretches = len(segment_paths(case, "middle")) if case is LATTE else 1
    bound = stretches * torch.finfo(torch.float32).eps * 2 * peak
    tensors = [(a, b) for a, b in zip(full[-1][1], reused[-1][1], strict=True)]
    assert all(torch.allclose(a, b, rtol=0, atol=bound) for a, b in tensors)
    # What follows is a block and a projection of order one: no more than a few hundred times the error that enters.
    assert torch.allclose(again, expected, rtol=0, atol=300 * bound)
    assert not all(model.cachekit.stats.records[-1].recomputed)


@cases
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_blocks_inside_a_segment_are_not_called(case: Case, segments: Any) -> None:
    model = case.build()
    calls = count_forwards(model, case)
    cachekit.wrap(model, every(3), segments=segments)
    conditioning = case.conditioning()
    covered = segment_paths(case, segments)
    for i, t in enumerate(SCHEDULE[:6]):
        calls.clear()
        model(**case.inputs(t, conditioning=conditioning))
        expected = case.stack if i % 3 == 0 else tuple(path for path in case.stack if path not in covered)
        assert calls == Counter(expected)
        assert model.cachekit.stats.records[-1].recomputed == tuple(path in expected for path in case.stack)


@cases
def test_blocks_before_the_segment_are_as_ever(case: Case) -> None:
    before = case.stack[: case.stack.index(segment_paths(case, "middle")[0])]
    seen: dict[bool, list[tuple[str, Any, Any]]] = {False: [], True: []}
    for wrapped, found in seen.items():
        model = cachekit.wrap(case.build(), every(4)) if wrapped else case.build()
        with watching(model, before, found):
            generate(model, case, TIMES)
    assert len(seen[True]) == len(before) * len(TIMES)
    for (path, inputs, results), (_, other_inputs, other_results) in zip(seen[True], seen[False], strict=True):
        assert_equal(inputs, other_inputs)
        assert_equal(results, other_results)


@cases
@pytest.mark.parametrize("shadowed", [False, True])
def test_unwrap_restores_every_dict(case: Case, shadowed: bool) -> None:
    model = case.build()
    if shadowed:
        count_forwards(model, case)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    expected = generate(model, case, TIMES[:1])
    for _ in range(2):
        cachekit.wrap(model, every(2))
        generate(model, case, TIMES)
        assert cachekit.unwrap(model) is model
        after = {path: dict(module.__dict__) for path, module in model.named_modules()}
        assert after.keys() == before.keys()
        for path, attributes in before.items():
            assert list(after[path]) == list(attributes), path
            assert all(after[path][name] is value for name, value in attributes.items()), path
    assert_equal(generate(model, case, TIMES[:1]), expected)


@cases
def test_weights_keep_their_names_and_values(case: Case) -> None:
    model = case.build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    cachekit.wrap(model)
    generate(model, case, TIMES)
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.load_state_dict(state)


def _by_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def _by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@cases
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _by_pickle, _by_torch_save])
def test_copies_use_their_own_weights(case: Case, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    expected = generate(cachekit.wrap(case.build(), every(2)), case, TIMES)
    model = cachekit.wrap(case.build(), every(2))
    generate(model, case, TIMES[:2])
    twin = duplicate(model)
    assert twin.cachekit is not model.cachekit
    # Nothing of the generation under way has come along.
    assert_equal(generate(twin, case, TIMES), expected)
    for path in case.stack:
        for parameter in twin.get_submodule(path).parameters():
            parameter.mul_(1.1)
    changed = generate(cachekit.wrap(cachekit.unwrap(copy.deepcopy(twin)), every(2)), case, TIMES)
    assert_equal(generate(twin, case, TIMES), changed)
    assert not any(torch.equal(a, b) for a, b in zip(changed, expected, strict=True))
    assert_equal(generate(model, case, TIMES), expected)
    assert "forward" in model.get_submodule(case.stack[0]).__dict__
    cachekit.unwrap(twin)
    assert_equal(generate(model, case, TIMES), expected)


Before = tuple[Sequence[float], Shape]
BEFORE: dict[str, Before] = {
    "aborted at once": (SCHEDULE[:1], Shape()),
    "aborted after two": (SCHEDULE[:2], Shape()),
    "aborted after five": (SCHEDULE[:5], Shape()),
    "other batch size": (SCHEDULE, Shape(batch=3)),
    "other resolution": (SCHEDULE[:4], Shape(scale=2)),
    "shorter schedule": (TIMES, Shape()),
    "longer schedule": (tuple(float(t) for t in range(990, 0, -50)), Shape()),
    "earlier start": ((999.0, 980.0), Shape()),
}


@cases
@pytest.mark.parametrize("arguments", BEGINNINGS[:4], ids=lambda arguments: str(arguments["policy"]))
def test_a_generation_is_the_same_after_any_other(case: Case, arguments: dict[str, Any]) -> None:
    alone = {seed: generate(cachekit.wrap(case.build(), **arguments), case, SCHEDULE, seed) for seed in (0, 1)}
    for name, (times, shape) in BEFORE.items():
        # Seed 0 after seed 0 is the hardest: the same start again, with the same conditioning.
        for seed in (0, 1):
            model = cachekit.wrap(case.build(), **arguments)
            generate(model, case, times, 0, shape)
            after = generate(model, case, SCHEDULE, seed)
            assert all(torch.equal(a, b) for a, b in zip(after, alone[seed], strict=True)), f"{name}, seed {seed}"


@cases
@pytest.mark.parametrize("finished", [False, True])
def test_a_generation_is_the_same_after_another_dtype(case: Case, finished: bool) -> None:
    wide = Shape(dtype=torch.float64)
    alone = generate(cachekit.wrap(case.build().double()), case, SCHEDULE, shape=wide)
    model = cachekit.wrap(case.build())
    generate(model, case, SCHEDULE if finished else SCHEDULE[:4])
    assert_equal(generate(model.double(), case, SCHEDULE, shape=wide), alone)
    assert alone[0].dtype == torch.float64


@cases
def test_the_graph(case: Case) -> None:
    model = case.build()
    found = cachekit.graph(model, **case.inputs(500))
    assert tuple(found.visits[v].block for v in found.blocks) == case.stack
    whole = tuple(range(len(case.stack)))
    # Latte rearranges the stream between any two of its blocks: no chain reaches further than one.
    assert found.chains == (tuple((v,) for v in whole) if case is LATTE else (whole,))
    assert set(found.long_skips) == set(case.long_skips)
    assert "cachekit" not in model.__dict__
    assert case.stack[0] in str(found)


def test_latte_segments_count_units() -> None:
    model = cachekit.wrap(LATTE.build(), every(2), segments=(1, 2))
    generate(model, LATTE, TIMES[:2])
    skipped = {"transformer_blocks.1", "temporal_transformer_blocks.1"}
    assert model.cachekit.stats.records[-1].recomputed == tuple(path not in skipped for path in LATTE.stack)
    found = cachekit.graph(model, **LATTE.inputs(500))
    # The temporal position embedding is added before the first temporal block; elsewhere the stream is only rearranged.
    assert [visit.linked for visit in found.visits] == [None, None] + ["layout"] * 8


def test_a_long_skip_out_of_a_reused_segment() -> None:
    """Blocks 5 to 7 are recomputed; two of them take what the reused blocks 1 and 2 returned, the third what block 0 did."""
    model = cachekit.wrap(HUNYUAN_DIT.build(), first(2), segments=(1, 5))
    late = HUNYUAN_DIT.stack[5:]
    full: list[tuple[str, Any, Any]] = []
    reused: list[tuple[str, Any, Any]] = []
    with model.cachekit.branch("a"):
        generate(model, HUNYUAN_DIT, TIMES[:1])
        with watching(model, late, full):
            expected = generate(model, HUNYUAN_DIT, TIMES[1:2])
        with watching(model, late, reused):
            again = generate(model, HUNYUAN_DIT, TIMES[1:2])
    assert_equal(again, expected)
    for (_, inputs, _), (_, other_inputs, _) in zip(reused, full, strict=True):
        assert_equal(inputs, other_inputs)
    ran = model.cachekit.stats.records[-1].recomputed
    assert ran == (True, False, False, False, False, True, True, True)


@cases
@pytest.mark.parametrize(("step", "position"), [(0, 3), (2, 2), (2, -1), (3, -1), (3, 0)])
def test_an_exception_in_a_block_leaves_nothing_behind(case: Case, step: int, position: int) -> None:
    """Steps 0 and 2 are full ones, step 3 is reused: there only the first and the last block can raise."""
    alone = generate(cachekit.wrap(case.build(), every(2), reuse="taylor-1"), case, SCHEDULE)
    model = cachekit.wrap(case.build(), every(2), reuse="taylor-1")

    def fail(block: nn.Module, args: Any) -> None:
        raise ZeroDivisionError(f"step {step}")

    generate(model, case, SCHEDULE[:step])
    # Within the block, so that it fails after its interceptor was entered.
    child = next(iter(model.get_submodule(case.stack[position]).children()))
    hook = child.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match=f"step {step}"):
        generate(model, case, SCHEDULE[step : step + 1])
    hook.remove()
    assert model.cachekit.stats.bytes_held == 0
    assert_equal(generate(model, case, SCHEDULE), alone)


@pytest.mark.gradients
@cases
def test_gradients_are_never_cached(case: Case) -> None:
    plain, model = case.build().train(), cachekit.wrap(case.build().train(), "every-10")
    grads = []
    for each in (plain, model):
        # DiT drops labels at random in training.
        torch.manual_seed(0)
        predictions = generate(each, case, TIMES)
        torch.stack(predictions).square().sum().backward()  # type: ignore[no-untyped-call]
        grads.append([parameter.grad for parameter in each.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    assert_equal(grads[1], grads[0])
    stats = model.cachekit.stats
    assert stats.uncached == {"gradients are recorded": len(TIMES)}
    assert stats.blocks_run == stats.blocks_total == len(TIMES) * len(case.stack)
    assert stats.bytes_peak == 0


@pytest.mark.gradients
@cases
def test_gradients_in_evaluation_mode_are_not_cached_and_say_so(case: Case) -> None:
    model = cachekit.wrap(case.build(), "every-10")
    with pytest.warns(UserWarning, match="no_grad"):
        predictions = generate(model, case, TIMES)
    assert all(prediction.requires_grad for prediction in predictions)
    assert sum(model.cachekit.stats.uncached.values()) == len(TIMES)


@cases
def test_mixed_timesteps_are_never_cached(case: Case) -> None:
    plain, model = case.build(), cachekit.wrap(case.build(), "every-10")
    generate(model, case, TIMES[:2])
    model.cachekit.stats.uncached.clear()
    for t in (500.0, 300.0):
        inputs = case.inputs(t)
        other = case.timestep(t - 100, Shape())
        inputs["timestep"] = torch.cat([inputs["timestep"][:1], other[1:]])
        assert torch.equal(case.output(model(**inputs)), case.output(plain(**inputs)))
        assert all(model.cachekit.stats.records[-1].recomputed)
    assert sum(model.cachekit.stats.uncached.values()) == 2
    assert any("mixed timesteps" in reason for reason in model.cachekit.stats.uncached)
    assert model.cachekit.stats.bytes_held == 0
