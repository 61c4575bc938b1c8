"""What a wrapped diffusers transformer keeps and leaves behind: attributes, weights, copies, earlier generations, exceptions."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import Case, Shape
from running import SCHEDULE, TIMES, assert_equal, cases, count_forwards, generate
from torch import nn

import cachekit
from cachekit.policies import every


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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


def _by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _by_torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, *(pytest.param(way, marks=pytest.mark.slow) for way in (_by_pickle, _by_torch_save))]


@cases
@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_use_their_own_weights(case: Case, duplicate: Callable[[Any], Any]) -> None:
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


POLICIES: tuple[Any, ...] = (
    pytest.param({"policy": "skip-every-2"}, id="skip-every-2"),
    pytest.param({"policy": "every-5", "segments": "all"}, id="every-5", marks=pytest.mark.slow),
    pytest.param({"policy": "N2-700-50", "reuse": "taylor-2"}, id="N2-700-50", marks=pytest.mark.slow),
    pytest.param({"policy": "change-0.1", "reuse": "residual"}, id="change-0.1", marks=pytest.mark.slow),
)

# What went before, and the seed of what follows it, with the same conditioning. The same seed again is the same start again.
BEFORE: dict[str, tuple[Sequence[float], Shape, int]] = {
    "aborted at once": (SCHEDULE[:1], Shape(), 0),
    "aborted after two": (SCHEDULE[:2], Shape(), 0),
    "aborted after five": (SCHEDULE[:5], Shape(), 0),
    "another aborted at once": (SCHEDULE[:1], Shape(), 1),
    "another aborted after five": (SCHEDULE[:5], Shape(), 1),
    "other batch size": (SCHEDULE, Shape(batch=3), 0),
    "other resolution": (SCHEDULE[:4], Shape(scale=2), 0),
    "shorter schedule": (TIMES, Shape(), 0),
    "longer schedule": (tuple(float(t) for t in range(990, 0, -110)), Shape(), 0),
    "earlier start": ((999.0, 980.0), Shape(), 0),
    "another's earlier start": ((999.0, 980.0), Shape(), 1),
}


@cases
@pytest.mark.parametrize("arguments", POLICIES)
def test_a_generation_is_the_same_after_any_other(case: Case, arguments: dict[str, Any]) -> None:
    alone = {seed: generate(cachekit.wrap(case.build(), **arguments), case, SCHEDULE, seed, prompt=0) for seed in (0, 1)}
    model = cachekit.wrap(case.build(), **arguments)
    for name, (times, shape, seed) in BEFORE.items():
        generate(model, case, times, 0, shape)
        assert_equal(generate(model, case, SCHEDULE, seed, prompt=0), alone[seed], f"after {name}, step")


@cases
@pytest.mark.parametrize("finished", [False, True])
def test_a_generation_is_the_same_after_another_dtype(case: Case, finished: bool) -> None:
    wide = Shape(dtype=torch.float64)
    alone = generate(cachekit.wrap(case.build().double()), case, SCHEDULE, shape=wide)
    model = cachekit.wrap(case.build())
    generate(model, case, SCHEDULE if finished else SCHEDULE[:4])
    assert_equal(generate(model.double(), case, SCHEDULE, shape=wide), alone)
    assert alone[0].dtype == torch.float64


PLACES = [(2, 2), (3, -1), *(pytest.param(*place, marks=pytest.mark.slow) for place in ((0, 3), (2, -1), (3, 0)))]


@cases
@pytest.mark.parametrize(("step", "position"), PLACES)
def test_an_exception_in_a_block_leaves_nothing_behind(case: Case, step: int, position: int) -> None:
    """Steps 0 and 2 are full ones, step 3 is reused: there only the first and the last block can raise."""
    alone = generate(cachekit.wrap(case.build(), every(2), reuse="taylor-1"), case, SCHEDULE)
    model = cachekit.wrap(case.build(), every(2), reuse="taylor-1")

    def fail(block: nn.Module, args: Any) -> None:
        raise ZeroDivisionError(f"step {step}")

    generate(model, case, SCHEDULE[:step], start=SCHEDULE[0])
    # Within the block, so that it fails after its interceptor was entered.
    child = next(iter(model.get_submodule(case.stack[position]).children()))
    hook = child.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match=f"step {step}"):
        generate(model, case, SCHEDULE[step : step + 1], start=SCHEDULE[0])
    hook.remove()
    assert model.cachekit.stats.bytes_held == 0
    assert_equal(generate(model, case, SCHEDULE), alone)
