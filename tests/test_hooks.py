"""Hooks of accelerate, torch and diffusers on a wrapped model's modules, put there and taken away in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cases import Case
from running import SCHEDULE, assert_equal, count_forwards, generate, ran, segment_paths
from torch import Tensor, nn
from zoo import DIT, HUNYUAN_DIT, HUNYUAN_VIDEO

import cachekit
from cachekit.policies import every, first

PLANNED = [i % 2 == 0 for i in range(len(SCHEDULE))]
cases = pytest.mark.parametrize(
    "case", [HUNYUAN_DIT, *(pytest.param(case, marks=pytest.mark.slow) for case in (DIT, HUNYUAN_VIDEO))], ids=str
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counting(ModelHook):  # type: ignore[misc]
    """Counts a module's calls before and after its forward, as hooks that move weights have to."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.after += 1
        return output


def hooked_paths(case: Case) -> tuple[str, ...]:
    """The model itself, its first block, and one in the middle of the stack."""
    return ("", case.stack[0], case.stack[len(case.stack) // 2])


def add_hooks(model: nn.Module, case: Case) -> dict[str, Counting]:
    """One hook for each of ``hooked_paths``."""
    hooks = {path: Counting() for path in hooked_paths(case)}
    for path, hook in hooks.items():
        add_hook_to_module(model.get_submodule(path), hook)
    return hooks


def remove_hooks(model: nn.Module, case: Case) -> None:
    """Take ``add_hooks``' away again."""
    for path in hooked_paths(case):
        remove_hook_from_module(model.get_submodule(path))


def assert_untouched(model: Any, case: Case) -> None:
    """Outputs are the unwrapped model's, every block runs at every step, and wrapping anew works as ever."""
    expected = generate(case.build(), case, SCHEDULE)
    calls = Counter[str]()
    handles = [
        module.register_forward_hook(lambda *_, path=path: calls.update([path]))
        for path in case.stack
        for module in list(model.get_submodule(path).children())[:1]
    ]
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert calls == dict.fromkeys(case.stack, len(SCHEDULE))
    for handle in handles:
        handle.remove()
    assert "cachekit" not in model.__dict__
    again = generate(cachekit.wrap(model, every(2)), case, SCHEDULE)
    assert_equal(again, generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE))
    assert_skipping(model, case)
    assert_equal(generate(cachekit.unwrap(model), case, SCHEDULE), expected)


def assert_skipping(model: Any, case: Case) -> None:
    """The last generation recomputed and reused what every(2) plans, block by block."""
    covered = segment_paths(case, "middle")
    for record, full in zip(model.cachekit.stats.records, PLANNED, strict=True):
        assert record.recomputed == tuple(full or path not in covered for path in case.stack)
    assert not model.cachekit.stats.dropped and not model.cachekit.stats.notes


@cases
def test_hooks_before_wrap_lie_inside(case: Case) -> None:
    """A reused block's hook is not run, so that nothing is moved to the device for it."""
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model = case.build()
    hooks = add_hooks(model, case)
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    cachekit.wrap(model, every(2))
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert_skipping(model, case)
    runs = [len(SCHEDULE), len(SCHEDULE), sum(PLANNED)]
    assert [hook.before for hook in hooks.values()] == [hook.after for hook in hooks.values()] == runs
    cachekit.unwrap(model)
    for path, attributes in before.items():
        now = model.get_submodule(path).__dict__
        assert now.keys() == attributes.keys() and all(now[name] is value for name, value in attributes.items())
    generate(model, case, SCHEDULE[:1])
    assert hooks[hooked_paths(case)[2]].after == runs[2] + 1
    remove_hooks(model, case)
    assert_untouched(model, case)


@cases
def test_hooks_after_wrap_taken_away_first(case: Case) -> None:
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model = case.build()
    attributes = {path: set(module.__dict__) for path, module in model.named_modules()}
    cachekit.wrap(model, every(2))
    hooks = add_hooks(model, case)
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert_skipping(model, case)
    # They lie outside, around reused blocks too.
    assert {hook.before for hook in hooks.values()} == {hook.after for hook in hooks.values()} == {len(SCHEDULE)}
    remove_hooks(model, case)
    assert_equal(generate(model, case, SCHEDULE), expected)
    cachekit.unwrap(model)
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == attributes
    assert_untouched(model, case)


@cases
def test_hooks_after_wrap_outlast_it(case: Case) -> None:
    """What lies under them can't be taken out, and does nothing from then on."""
    model = cachekit.wrap(case.build(), every(2))
    hooks = add_hooks(model, case)
    generate(model, case, SCHEDULE[:3])
    cachekit.unwrap(model)
    expected = generate(case.build(), case, SCHEDULE)
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert {hook.after for hook in hooks.values()} == {3 + len(SCHEDULE)}
    remove_hooks(model, case)
    assert_untouched(model, case)


@cases
def test_hooks_before_wrap_taken_away_while_wrapped(case: Case) -> None:
    """accelerate then puts the module's own forward back, and ours is gone with its hook: blocks are wrapped anew."""
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model = case.build()
    for path in case.stack:
        add_hook_to_module(model.get_submodule(path), Counting())
    cachekit.wrap(model, every(2))
    generate(model, case, SCHEDULE[:3])
    for path in case.stack[1:4]:
        remove_hook_from_module(model.get_submodule(path))
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert_skipping(model, case)
    cachekit.unwrap(model)
    for path in case.stack:
        remove_hook_from_module(model.get_submodule(path))
    assert_untouched(model, case)


@cases
def test_wrapping_anew_between_hooks(case: Case) -> None:
    """A policy changed while hooks are in place, then everything taken away in the order in which it came."""
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model = cachekit.wrap(case.build(), "every-3")
    add_hooks(model, case)
    cachekit.wrap(model, every(2))
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert_skipping(model, case)
    cachekit.unwrap(model)
    remove_hooks(model, case)
    assert_untouched(model, case)


@cases
def test_torch_hooks_run_on_every_step(case: Case) -> None:
    expected = generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE)
    model = case.build()
    counts = count_forwards(model, case)
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for path in case.stack:
        block = model.get_submodule(path)
        block.register_forward_pre_hook(lambda *_, path=path: before.update([path]))
        block.register_forward_hook(lambda *_, path=path: after.update([path]))
    cachekit.wrap(model, every(2))
    assert_equal(generate(model, case, SCHEDULE), expected)
    assert_skipping(model, case)
    assert before == after == dict.fromkeys(case.stack, len(SCHEDULE))
    # Inside a block they run where the block does.
    assert {counts[path] for path in segment_paths(case, "middle")} == {sum(PLANNED)}


def louder(block: nn.Module, args: Any, result: Any) -> Any:
    """A hook that changes what a block returns."""
    if isinstance(result, Tensor):
        return result * 1.5
    return (result[0] * 1.5, *result[1:])


@cases
@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
def test_torch_hooks_may_change_what_blocks_return(case: Case, order: str) -> None:
    plain = case.build()
    changed = case.stack[2]
    plain.get_submodule(changed).register_forward_hook(louder)
    expected = generate(plain, case, SCHEDULE)
    assert not torch.equal(expected[0], generate(case.build(), case, SCHEDULE[:1])[0])
    model = case.build()
    if order == "after wrap":
        cachekit.wrap(model, first(3))
    model.get_submodule(changed).register_forward_hook(louder)
    if order == "before wrap":
        cachekit.wrap(model, first(3))
    with model.cachekit.branch("a"):
        found = generate(model, case, SCHEDULE[:3])
        again = generate(model, case, SCHEDULE[2:3], start=SCHEDULE[0])[0]
    assert_equal(found, expected[:3])
    assert torch.equal(again, found[-1])
    assert ran(model) == tuple(path not in segment_paths(case, "middle") for path in case.stack)


@cases
def test_a_models_own_hook_taken_away_while_wrapped(case: Case) -> None:
    """accelerate puts the model's forward back over ours: nothing is cached from then on, and wrapping again mends it."""
    model = case.build()
    add_hook_to_module(model, Counting())
    cachekit.wrap(model, every(2))
    generate(model, case, SCHEDULE[:3])
    remove_hook_from_module(model)
    assert_equal(generate(model, case, SCHEDULE), generate(case.build(), case, SCHEDULE))
    cachekit.wrap(model, every(2))
    assert_equal(generate(model, case, SCHEDULE), generate(cachekit.wrap(case.build(), every(2)), case, SCHEDULE))
    assert_skipping(model, case)
    cachekit.unwrap(model)
    assert_untouched(model, case)


@pytest.mark.parametrize("order", ["before wrap", "after wrap"])
def test_layerwise_casting(order: str) -> None:
    """diffusers casts the weights of each layer just for its call, by hooks that replace forward too."""
    plain = DIT.build()
    plain.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = generate(plain, DIT, SCHEDULE)
    steps: list[Callable[[Any], Any]] = [
        lambda model: model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
        lambda model: cachekit.wrap(model, every(2)),
    ]
    model = DIT.build()
    for step in steps if order == "before wrap" else reversed(steps):
        step(model)
    found = generate(model, DIT, SCHEDULE)
    assert torch.equal(found[0], expected[0])
    assert_skipping(model, DIT)
    assert_equal(generate(cachekit.unwrap(model), DIT, SCHEDULE), expected)
