"""What must hold for every stack, schedule, policy, segment and reuse."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stacks import (
    LAYOUTS,
    Run,
    Stack,
    StackSpec,
    advance,
    blocks_of,
    build,
    calls,
    conditioning,
    equal,
    given_time,
    noise,
    schedules,
    stack_specs,
    tensor_of,
    visits_of,
)
from torch import Tensor, nn

import cachekit
from cachekit import Forecast
from cachekit.policies import at_most, change, every, first, last, outside
from cachekit.policy import Policy, Step

STRINGS = ("skip-every-2", "skip-every-3", "N2-700-50", "every-2 | outside-700-50", "first-2 & every-2", "at-most-2")
REUSES = ("output", "residual", "taylor-1", "taylor-2", "residual-taylor-1", "residual-taylor-2")


@dataclass(frozen=True)
class At(Policy[None]):
    """Recompute at these step indices and at no others."""

    indices: frozenset[int]

    def decide(self, state: None, step: Step) -> bool:
        return step.i in self.indices


def reuses(held: bool | None = None, betas: Sequence[float] = (0.0, 0.5, 1.0)) -> st.SearchStrategy[Any]:
    """Any reuse; as objects all three numbers vary."""
    objects = st.builds(Forecast, order=st.integers(0, 3), beta=st.sampled_from(betas), bound=st.sampled_from((1.5, 5.0, 50.0)))
    strings = [name for name in REUSES if name.startswith("residual") <= (1.0 in betas)]
    return st.sampled_from(strings) | objects


def leaves(probe: bool = False) -> st.SearchStrategy[Policy[Any]]:
    """Single policies; those that watch a block only where asked for."""
    found = [
        st.builds(every, st.integers(1, 4)),
        st.builds(at_most, st.integers(1, 3)),
        st.builds(first, st.integers(0, 4)),
        st.builds(last, st.integers(0, 3)),
        st.builds(outside, st.integers(400, 900), st.integers(0, 400)),
    ]
    return st.one_of([*found, st.builds(change, st.sampled_from((0.01, 0.1, 0.5)))] if probe else found)


def policies(probe: bool = False) -> st.SearchStrategy[Policy[Any]]:
    """Policies and what ``|`` and ``&`` make of them."""

    def combined(inner: st.SearchStrategy[Policy[Any]]) -> st.SearchStrategy[Policy[Any]]:
        return st.builds(lambda a, b, either: a | b if either else a & b, inner, inner, st.booleans())

    return st.recursive(leaves(probe), combined, max_leaves=3)


@st.composite
def segments(draw: Any, n: int, model: bool = True) -> Any:
    """Segments that fit a stack of n blocks, in all ways to write them."""
    choices = ["middle", "all", "skip", "pair", "several", "object"] + ["model"] * model
    kind = draw(st.sampled_from(choices))
    if kind in ("middle", "all", "model"):
        return draw(st.sampled_from((None, "middle"))) if kind == "middle" else kind
    if kind == "skip":
        return f"skip-{draw(st.integers(0, n // 2))}"
    cuts = sorted(draw(st.sets(st.integers(0, n), min_size=min(2, n + 1), max_size=4)))
    if len(cuts) < 2:
        return "all"
    pairs = list(zip(cuts, cuts[1:], strict=False))
    if kind == "several":
        return pairs
    return pairs[0] if kind == "pair" else cachekit.Segment(*pairs[0])


def covered(written: Any, n: int) -> set[int]:
    """The visits that segments cover, worked out apart from the core."""
    if written == "model":
        return set(range(n))
    if written is None or written == "middle":
        return set(range(1, n - 1))
    if written == "all":
        return set(range(n))
    if isinstance(written, str):
        k = int(written.removeprefix("skip-"))
        return set(range(k, n - k))
    if isinstance(written, list):
        return {v for pair in written for v in range(*pair)}
    if isinstance(written, cachekit.Segment):
        return set(range(written.start, written.stop))  # type: ignore[arg-type]
    return set(range(*written))


@dataclass(frozen=True)
class Case:
    """One model and how it is wrapped."""

    spec: StackSpec
    policy: Any
    segments: Any
    reuse: Any
    explicit: bool

    def wrap(self, model: Stack | None = None, **changed: Any) -> Stack:
        """A wrapped model of the case: a new one unless one is given."""
        using = {"policy": self.policy, "segments": self.segments, "reuse": self.reuse, **changed}
        model = build(self.spec) if model is None else model
        return cachekit.wrap(model, using["policy"], segments=using["segments"], reuse=using["reuse"])

    def run(self, model: Stack, run: Run) -> list[Tensor]:
        """One generation, in a session that knows its timesteps or in none."""
        with session(model, run.times) if self.explicit else contextlib.nullcontext():
            return run.outputs(model)


def session(model: Stack, times: Sequence[float]) -> contextlib.AbstractContextManager[Any]:
    """An explicit session."""
    return model.cachekit.session(timesteps=times)  # type: ignore[union-attr, operator, no-any-return]


def stats(model: Stack) -> Any:
    """What a wrapped model says of itself."""
    return model.cachekit.stats  # type: ignore[union-attr]


@st.composite
def cases(draw: Any, model: bool = True, layouts: Sequence[str] = LAYOUTS, betas: Sequence[float] = (0.0, 0.5, 1.0)) -> Case:
    """Anything that can be wrapped, in any way."""
    spec = draw(stack_specs(layouts))
    n = len(visits_of(build(spec)))
    where = draw(segments(n, model))
    probe = bool(covered(where, n)) and min(covered(where, n)) > 0 and where != "model" and not isinstance(where, list)
    policy = draw(policies(probe) | st.sampled_from(STRINGS))
    return Case(spec, policy, where, draw(reuses(betas=betas)), draw(st.booleans()))


runs = st.builds(Run, schedules(), st.integers(0, 9), st.sampled_from((4, 5)))


# 1. Exactness.


@given(cases(), runs)
def test_every_1_is_bit_equal_on_every_step(case: Case, run: Run) -> None:
    model = case.wrap(policy=every(1))
    assert equal(case.run(model, run), run.outputs(build(case.spec)))
    assert calls(model) == [c * len(run.times) for c in _calls_of_one(case.spec)]


def _calls_of_one(spec: StackSpec) -> list[int]:
    model = build(spec)
    Run((500.0,)).outputs(model)
    return calls(model)


@given(cases(), runs, runs)
def test_the_first_step_of_any_generation_is_bit_equal(case: Case, one: Run, other: Run) -> None:
    model, plain = case.wrap(), build(case.spec)
    for run in (one, replace(other, seed=10 + other.seed)):
        assert torch.equal(case.run(model, run)[0], run.outputs(plain)[0])


@given(cases(), runs)
def test_disabled_is_bit_equal_and_counts_nothing_as_cached(case: Case, run: Run) -> None:
    model = case.wrap()
    with model.cachekit.disabled():  # type: ignore[union-attr, operator]
        assert equal(run.outputs(model), run.outputs(build(case.spec)))


# 2. A reused step on the very inputs of the stored one.


def _repeated(case: Case, run: Run, double: bool = False) -> tuple[Tensor, Tensor]:
    """The last recomputed output of a run, and what reuse makes of the same inputs."""
    history = frozenset(range(len(run.times)))
    model = case.wrap(build(case.spec).double() if double else None, policy=At(history))
    dtype = torch.float64 if double else torch.float32
    x, y = noise(case.spec, run.batch, run.seed, dtype=dtype), conditioning(case.spec, run.batch, run.seed)
    handle: Any = model.cachekit
    with torch.no_grad(), handle.session(), handle.branch("a"):
        for t in run.times:
            time = given_time(case.spec, t, run.batch)
            stored = tensor_of(model(x, time, y)).clone()
            before, x = x, advance(x, stored, 50)
        before_calls = calls(model)
        reused = tensor_of(model(before, time, y)).clone()
    again = [b - a for a, b in zip(before_calls, calls(model), strict=True)]
    if case.segments == "model":
        assert not any(again)
    record = handle.stats.records[-1]
    assert sum(record.recomputed) == len(record.recomputed) - len(covered(case.segments, len(record.recomputed)))
    return stored, reused


@given(cases(betas=(0.0,)), runs)
def test_the_same_inputs_give_the_same_output_bit_by_bit(case: Case, run: Run) -> None:
    stored, reused = _repeated(case, run)
    assert torch.equal(stored, reused)


@given(cases(), runs)
def test_the_same_inputs_give_the_same_output_within_rounding(case: Case, run: Run) -> None:
    # With beta a site gives beta * x + (y - beta * x): three roundings, each at most u = 2^-53 of a value of order 1 to 10.
    # A block passes an error on at most about ten times as large (1 + |1 + gate| * |mix| * |1 + scale|), and a model has
    # at most ten visits; those that are reused add none. Observed is far less, and a wrong residual is off by 1e-2.
    stored, reused = _repeated(case, run, double=True)
    assert torch.allclose(stored, reused, rtol=1e-7, atol=1e-7)


# 3. What runs, and what does not.


@given(cases(), runs)
def test_blocks_in_a_segment_are_not_called_and_all_others_are(case: Case, run: Run) -> None:
    model = case.wrap()
    visits = visits_of(model)
    inside = covered(case.segments, len(visits))
    lone = [block for block in blocks_of(model) if block not in visits]
    with torch.no_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        before = calls(model)
        for i, _ in enumerate(run.steps(model)):
            recomputed = stats(model).records[-1].recomputed
            assert len(recomputed) == len(visits)
            assert all(recomputed[v] for v in range(len(visits)) if v not in inside)
            if i == 0:
                assert all(recomputed)
            ran = [b - a for a, b in zip(before, calls(model), strict=True)]
            for block, count in zip(blocks_of(model), ran, strict=True):
                mine = sum(recomputed[v] for v, visited in enumerate(visits) if visited is block)
                assert count == (mine if block not in lone else int(case.segments != "model" or any(recomputed)))
            before = calls(model)
    assert stats(model).steps == len(run.times)
    assert stats(model).blocks_total == len(run.times) * len(visits)
    assert stats(model).blocks_run == sum(sum(record.recomputed) for record in stats(model).records)


@given(cases(model=False), runs)
def test_outside_a_segment_nothing_changes(case: Case, run: Run) -> None:
    """Whatever runs computes of its inputs what it always did, and what the segment can't have reached is bit-equal."""
    model, plain = case.wrap(), build(case.spec)
    twins = dict(zip(blocks_of(model), blocks_of(plain), strict=True))
    visits = visits_of(model)
    inside = covered(case.segments, len(visits))
    untouched = min(inside, default=len(visits))
    seen: list[tuple[nn.Module, Any, Any]] = []
    expected: list[Any] = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda module, args, result: seen.append((module, None, copy.deepcopy(result))))
    for block in blocks_of(plain):
        block.register_forward_hook(lambda module, args, result: expected.append(copy.deepcopy(result)))
    y = conditioning(case.spec, run.batch, run.seed)
    x = noise(case.spec, run.batch, run.seed)
    with torch.no_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        for t in run.times:
            seen.clear()
            expected.clear()
            time = given_time(case.spec, t, run.batch)
            prediction = tensor_of(model(x, time, y))
            plain(x, time, y)
            listed = [k for k, (block, _, _) in enumerate(seen) if block in visits]
            assert [twins[block] for block, _, _ in seen] == [twins[block] for block, _, _ in seen]
            for k in listed[:untouched]:
                assert _same(seen[k][2], expected[k])
            if not inside:
                assert _same([item[2] for item in seen], expected)
            x = advance(x, prediction, 50)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(p, q) for p, q in zip(a, b, strict=True))
    return bool(a == b)


# 4. The model stays what it was.


def _snapshot(model: nn.Module) -> dict[str, list[tuple[str, Any, list[tuple[str, Any]]]]]:
    """Each module's ``__dict__``: names in order, the objects, and what lies in those that are dictionaries."""
    found = {}
    for path, module in model.named_modules():
        items = [(key, value) for key, value in module.__dict__.items() if key != "calls"]
        found[path] = [(k, v, list(v.items()) if isinstance(v, dict) else []) for k, v in items]
    return found


def _identical(a: Any, b: Any) -> bool:
    def flat(snapshot: Any) -> list[Any]:
        return [
            (path, key, id(value), [(k, id(v)) for k, v in inner])
            for path, items in snapshot.items()
            for key, value, inner in items
        ]

    return flat(a) == flat(b)


def _shadow(model: Stack) -> None:
    """Put a forward into a block's ``__dict__``, between other entries, as some models and accelerate do."""
    block = blocks_of(model)[0]
    block.__dict__["forward"] = block.forward
    block.__dict__["later"] = "entry"


@given(cases(), runs, st.booleans(), st.booleans())
def test_unwrap_restores_every_dict(case: Case, run: Run, shadowed: bool, abort: bool) -> None:
    model = build(case.spec)
    if shadowed:
        _shadow(model)
    before, keys = _snapshot(model), list(model.state_dict())
    case.wrap(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        steps = run.steps(model)
        next(steps) if abort else list(steps)
    assert list(model.state_dict()) == keys
    assert cachekit.unwrap(model) is model
    assert _identical(before, _snapshot(model))
    assert equal(run.outputs(model), run.outputs(build(case.spec)))


@given(cases(), runs)
def test_wrap_unwrap_wrap_equals_wrap(case: Case, run: Run) -> None:
    model = case.wrap()
    once = case.run(model, run)
    cachekit.unwrap(model)
    assert equal(case.run(case.wrap(model), run), once)
    # The same once more, now replacing what is there.
    assert equal(case.run(case.wrap(model), run), once)


@given(cases(), runs, st.sampled_from(("deepcopy", "pickle")), st.integers(0, 3))
def test_copies_of_a_wrapped_model_use_their_own_weights(case: Case, run: Run, how: str, after: int) -> None:
    model = case.wrap()
    with torch.no_grad():
        for _, _ in zip(range(after), run.steps(model), strict=False):
            pass
    ran, counted = calls(model), stats(model).steps
    twin: Stack = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    fresh = case.wrap(_halved(case.spec))
    assert equal(case.run(twin, run), case.run(fresh, run))
    assert calls(model) == ran and stats(model).steps == counted
    before = calls(twin)
    assert equal(case.run(model, run), case.run(case.wrap(), run))
    assert calls(twin) == before
    cachekit.unwrap(twin)
    assert equal(run.outputs(twin), run.outputs(_halved(case.spec)))
    assert hasattr(model, "cachekit") and not hasattr(twin, "cachekit")


def _halved(spec: StackSpec) -> Stack:
    model = build(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


# 5. One generation knows nothing of the one before.


@dataclass(frozen=True)
class Before:
    """What came before: a run, and after how many steps it was given up."""

    run: Run
    steps: int


@st.composite
def befores(draw: Any, spec: StackSpec) -> Before:
    run = Run(
        draw(schedules()),
        seed=draw(st.integers(20, 29)),
        batch=draw(st.sampled_from((4, 5, 8))),
        tokens=draw(st.sampled_from((None, 4, 8))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.float64))),
    )
    return Before(run, draw(st.integers(0, len(run.times))))


def _wide(spec: StackSpec) -> StackSpec:
    # Two noises of six numbers can point the same way by chance; of forty-eight they can't.
    return replace(spec, tokens=max(spec.tokens, 4))


@given(st.data(), cases(), runs)
def test_a_generation_is_the_same_whatever_came_before(data: st.DataObject, case: Case, run: Run) -> None:
    case = replace(case, spec=_wide(case.spec), explicit=False)
    model = case.wrap()
    for before in data.draw(st.lists(befores(case.spec), min_size=1, max_size=3)):
        with torch.no_grad():
            for _, _ in zip(range(before.steps), before.run.steps(model), strict=False):
                pass
    assert equal(case.run(model, run), case.run(case.wrap(), run))


@given(cases(), runs, st.integers(0, 11), st.booleans())
def test_the_same_noise_again_is_a_new_generation(case: Case, run: Run, stop: int, later: bool) -> None:
    """Given up and started again, from the first timestep or (fewer steps, image to image) from a later one."""
    case = replace(case, spec=_wide(case.spec), explicit=False)
    model = case.wrap()
    with torch.no_grad():
        for _, _ in zip(range(stop % len(run.times)), run.steps(model), strict=False):
            pass
    again = replace(run, times=run.times[1:]) if later else run
    assert equal(case.run(model, again), case.run(case.wrap(), again))


@given(cases(), runs, st.integers(1, 4))
def test_other_noise_at_the_timestep_of_the_abort_is_a_new_generation(case: Case, run: Run, stop: int) -> None:
    case = replace(case, spec=_wide(case.spec), explicit=False)
    model = case.wrap()
    stop = min(stop, len(run.times))
    with torch.no_grad():
        for _, _ in zip(range(stop), run.steps(model), strict=False):
            pass
    after = Run(run.times[stop - 1 :], seed=run.seed + 40, batch=run.batch)
    assert equal(case.run(model, after), case.run(case.wrap(), after))


@given(cases(), runs)
def test_rising_time_is_read_as_such(case: Case, run: Run) -> None:
    """A model whose time rises, with no adapter that says so: all steps belong to one generation."""
    case = replace(case, spec=_wide(case.spec), explicit=False)
    assume(not isinstance(case.policy, str))
    rising = replace(run, times=run.times[::-1])
    model = case.wrap(policy=every(2))
    case.run(model, rising)
    assert [record.i for record in stats(model).records] == list(range(len(run.times)))
    assert stats(model).generations == 1


@pytest.mark.parametrize("steps", [20, 50, 100, 250])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_fine_schedules_are_one_generation(steps: int, scale: float) -> None:
    """Along DDIM's steps of the linear schedule the first samples hardly turn: data of this scale under full noise."""
    model = cachekit.wrap(build(StackSpec(depth=4, order=(0, 1, 2, 3), tokens=64, glue=("",) * 8)), every(2))
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    generator = torch.Generator().manual_seed(0)
    data, eps = (torch.randn(2, 64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    times = list(range(999, -1, -(1000 // steps)))[:12]
    with torch.no_grad():
        for t in times:
            x = (kept[t].sqrt() * data * scale + (1 - kept[t]).sqrt() * eps).float()
            model(x, torch.full((2,), t), torch.zeros(2, dtype=torch.int64))
    assert [record.i for record in stats(model).records] == list(range(len(times)))
    assert stats(model).generations == 1


# 6. Branches.


@given(cases(), runs, st.booleans(), st.booleans(), st.sampled_from(("same", "swapped", "equal")))
def test_separate_calls_of_cond_and_uncond_never_share(case: Case, run: Run, cloned: bool, rebuilt: bool, kind: str) -> None:
    case = replace(case, spec=_wide(case.spec))
    ys = [conditioning(case.spec, run.batch, seed) for seed in ((1, 1) if kind == "equal" else (1, 2))]
    xs = _samples(case.spec, run)
    alone = [_on(case, case.wrap(), run, xs, [y])[0] for y in ys]
    together = _on(case, model := case.wrap(), run, xs, ys, cloned, rebuilt, swap=kind == "swapped" and not case.explicit)
    assert equal(together[0], alone[0]) and equal(together[1], alone[1])
    assert stats(model).generations == 1


def _samples(spec: StackSpec, run: Run) -> list[Tensor]:
    """Samples of an uncached run, to be given whatever the branches predict."""
    x, found = noise(spec, run.batch, run.seed), []
    for t, prediction in zip(run.times, run.outputs(build(spec)), strict=True):
        found.append(x)
        x = advance(x, prediction, t / 4)
    return found


def _on(
    case: Case,
    model: Stack,
    run: Run,
    xs: list[Tensor],
    ys: list[Tensor],
    cloned: bool = False,
    rebuilt: bool = False,
    swap: bool = False,
) -> list[list[Tensor]]:
    """Predictions for each conditioning on given samples, in separate calls."""
    found: list[list[Tensor]] = [[] for _ in ys]
    with torch.no_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        for i, (t, x) in enumerate(zip(run.times, xs, strict=True)):
            order = reversed(list(enumerate(ys))) if swap and i % 2 else enumerate(ys)
            for k, y in order:
                x, y = x.clone() if cloned else x, y.clone() if rebuilt else y
                found[k].append(tensor_of(model(x, given_time(case.spec, t, run.batch), y)).clone())
    return found


@given(cases(), runs)
def test_named_branches_never_share(case: Case, run: Run) -> None:
    """As above, named: in any order, on different samples."""
    ys = [conditioning(case.spec, run.batch, seed) for seed in (1, 2)]
    streams = [_samples(case.spec, run), _samples(case.spec, replace(run, seed=run.seed + 50))]
    alone = [_on(case, case.wrap(), run, xs, [y])[0] for xs, y in zip(streams, ys, strict=True)]
    model = case.wrap()
    handle: Any = model.cachekit
    found: list[list[Tensor]] = [[], []]
    with torch.no_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        for i, t in enumerate(run.times):
            for k in (0, 1) if i % 2 else (1, 0):
                with handle.branch("ab"[k]):
                    output = model(streams[k][i], given_time(case.spec, t, run.batch), ys[k])
                found[k].append(tensor_of(output).clone())
    assert equal(found[0], alone[0]) and equal(found[1], alone[1])


@given(cases(), runs)
def test_batched_guidance_is_one_branch(case: Case, run: Run) -> None:
    case = replace(case, spec=_wide(case.spec))
    model, plain = case.wrap(), case.wrap(policy=every(1))
    y = torch.cat([conditioning(case.spec, run.batch, 1), conditioning(case.spec, run.batch, 2)])
    for wrapped, exact in ((plain, True), (model, False)):
        unwrapped, x = build(case.spec), noise(case.spec, run.batch, run.seed)
        with torch.no_grad(), session(wrapped, run.times) if case.explicit else contextlib.nullcontext():
            for i, t in enumerate(run.times):
                given = torch.cat([x, x]), given_time(case.spec, t, 2 * run.batch), y
                prediction = tensor_of(wrapped(*given))
                if exact or i == 0:
                    assert torch.equal(prediction, tensor_of(unwrapped(*given)))
                cond, uncond = prediction.chunk(2)
                x = advance(x, uncond + 2 * (cond - uncond), 100)
        assert [record.i for record in stats(wrapped).records] == list(range(len(run.times)))
        assert len({record.branch for record in stats(wrapped).records}) == 1


# 7. Exceptions.


class Boom(Exception):
    """Raised in a block."""


@given(cases(), runs, st.integers(0, 11), st.integers(0, 7), st.booleans())
def test_an_exception_in_a_block_leaves_nothing_behind(case: Case, run: Run, step: int, where: int, late: bool) -> None:
    model = case.wrap()
    block = visits_of(model)[where % len(visits_of(model))]
    original, armed = block.mix.forward, [False]

    def raising(x: Tensor) -> Tensor:
        if armed[0]:
            raise Boom
        return original(x)

    block.mix.__dict__["forward"] = raising
    raised = False
    with torch.no_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        steps = run.steps(model)
        for i in range(len(run.times)):
            armed[0] = i == step % len(run.times)
            try:
                next(steps)
            except Boom:
                raised = True
                break
        armed[0] = False
        if raised:
            assert stats(model).bytes_held == 0
    if late:
        # The failed step, tried again on its own: full, as the first of a generation is.
        t = run.times[step % len(run.times)]
        again = Run((t,), run.seed, run.batch)
        assert not raised or equal(again.outputs(model), again.outputs(build(case.spec)))
        model.cachekit.reset()  # type: ignore[union-attr, operator]
    else:
        assume(raised)
    assert equal(case.run(model, run), case.run(case.wrap(), run))


# 8. What is never cached.


@given(cases(), runs)
def test_training_with_gradients_is_never_cached(case: Case, run: Run) -> None:
    case = replace(case, spec=replace(case.spec, in_place=frozenset(), glue=("",) * 8))
    model, plain = case.wrap().train(), build(case.spec).train()
    losses = []
    for each in (model, plain):
        total = torch.stack([prediction.square().mean() for prediction in run.steps(each)]).sum()
        total.backward()
        losses.append(total.detach())
    assert torch.equal(*losses)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert sum(stats(model).uncached.values()) == len(run.times)
    assert stats(model).blocks_run == stats(model).blocks_total
    # Nothing of it is left for the generation that follows.
    model.zero_grad(set_to_none=True)
    assert equal(case.run(model.eval(), run), case.run(case.wrap(), run))


@given(cases(), runs)
def test_mixed_timesteps_are_never_cached(case: Case, run: Run) -> None:
    case = replace(case, spec=replace(case.spec, time="int"))
    model, plain = case.wrap(), build(case.spec)
    x, y = noise(case.spec, run.batch, run.seed), conditioning(case.spec, run.batch, run.seed)
    with torch.no_grad():
        for t in run.times:
            mixed = given_time(case.spec, t, run.batch)
            mixed[0] += 1
            prediction = tensor_of(model(x, mixed, y))
            assert torch.equal(prediction, tensor_of(plain(x, mixed, y)))
            x = advance(x, prediction, 50)
    assert sum(stats(model).uncached.values()) == len(run.times)
    assert stats(model).blocks_run == stats(model).blocks_total
    assert equal(case.run(model, run), case.run(case.wrap(), run))


@given(cases(), runs)
def test_gradients_in_evaluation_mode_are_not_cached(case: Case, run: Run) -> None:
    """Guidance by gradients runs in evaluation mode: nothing is cached, so that no gradient is cut off, and that is counted."""
    case = replace(case, spec=replace(case.spec, in_place=frozenset(), glue=("",) * 8))
    model = case.wrap()
    with torch.enable_grad(), session(model, run.times) if case.explicit else contextlib.nullcontext():
        found = []
        for prediction in run.steps(model):
            found.append(prediction.detach())
    assert equal(found, run.outputs(build(case.spec)))
    assert sum(stats(model).uncached.values()) == len(run.times)
    assert stats(model).bytes_held == 0


# 9. Forecasts.

times_of = st.sets(st.integers(1, 999), min_size=5, max_size=5).map(lambda drawn: [float(t) for t in sorted(drawn)])


@given(st.integers(0, 4), times_of, st.integers(0, 999), st.lists(st.integers(-9, 9), min_size=5, max_size=5))
def test_forecasts_are_exact_on_polynomials(order: int, nodes: list[float], t: int, coefficients: list[int]) -> None:
    weights = Forecast(order=order, bound=1e30).weights(nodes, float(t))
    assert len(weights) <= order + 1

    def value(at: float) -> float:
        return sum(c * (at / 1000) ** k for k, c in enumerate(coefficients[: order + 1]))

    forecast = sum(w * value(node) for w, node in zip(weights, nodes, strict=False))
    # Each of the products and sums rounds by 2^-53 of the terms' size, the weights by a few of these themselves.
    size = 1 + sum(abs(w) * abs(value(node)) for w, node in zip(weights, nodes, strict=False)) + abs(value(t))
    assert abs(forecast - value(t)) <= 100 * 2**-53 * size


def _exact_weights(nodes: Sequence[float], t: float) -> list[Fraction]:
    """Lagrange's weights, in exact fractions."""
    found = []
    for j, node in enumerate(nodes):
        weight = Fraction(1)
        for k, other in enumerate(nodes):
            weight *= 1 if k == j else Fraction(t - other) / Fraction(node - other)
        found.append(weight)
    return found


def expected_weights(order: int, bound: float, nodes: Sequence[float], t: float) -> list[float]:
    """The weights that a bounded forecast must use, newest node first: the highest order that the bound allows."""
    for k in range(min(order, len(nodes) - 1), 0, -1):
        weights = _exact_weights(nodes[: k + 1], t)
        size = sum(abs(w) for w in weights)
        assume(abs(float(size) - bound) > 1e-9)
        if size <= bound:
            return [float(w) for w in weights]
    return [1.0]


@given(st.integers(0, 4), st.floats(1.0, 20.0), times_of, st.integers(1, 5), st.integers(0, 999))
def test_bounded_weights_lower_the_order(order: int, bound: float, nodes: list[float], length: int, t: int) -> None:
    ours = Forecast(order=order, bound=bound).weights(nodes[:length], float(t))
    theirs = expected_weights(order, bound, nodes[:length], float(t))
    ours = [w for w in ours if w != 0]
    assert ours == pytest.approx([w for w in theirs if w != 0], rel=1e-12)


class Polynomial(nn.Module):
    """A block whose output is a polynomial in t, whatever came in."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.coefficients = nn.Parameter(torch.randn(degree + 1, 3, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        powers = torch.stack([(t / 1000) ** k for k in range(len(self.coefficients))])
        return (powers[:, :, None] * self.coefficients[:, None]).sum(0)[:, None].expand_as(x).clone()


class PolynomialModel(nn.Module):
    """Two such blocks."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Polynomial(degree), Polynomial(degree)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


@given(st.integers(0, 3), schedules(min_size=6, max_size=9), st.sampled_from(("all", "model", (1, 2))))
def test_a_polynomial_model_is_forecast_exactly(degree: int, times: tuple[float, ...], where: Any) -> None:
    torch.manual_seed(degree)
    model = PolynomialModel(degree)
    policy, reuse = At(frozenset(range(degree + 1))), Forecast(order=degree, bound=1e30)
    wrapped: Any = cachekit.wrap(copy.deepcopy(model), policy, segments=where, reuse=reuse)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad(), wrapped.cachekit.session(timesteps=times):
        for i, t in enumerate(times):
            given = torch.full((2,), t, dtype=torch.float64)
            size = sum(abs(float(w)) for w in _exact_weights(times[: degree + 1], t))
            assert torch.allclose(wrapped(x, given), model(x, given), rtol=0, atol=1e-13 * size)
            x = x + 0.1 * i
    assert wrapped.blocks[1].calls == degree + 1


# 10. A slow reference that is plain to read.


class Reference:
    """Caching written out by hand for a stack that is one list and one chain: called in the place of ``Stack.walk``."""

    def __init__(self, model: Stack, ranges: Sequence[tuple[int, int]], plans: Sequence[Sequence[bool]], reuse: Any) -> None:
        self.model, self.ranges, self.plans, self.reuse = model, ranges, plans, reuse
        self.histories: list[list[tuple[float, Tensor]]] = [[] for _ in ranges]
        self.i, self.t = 0, 0.0

    def __call__(self, blocks: Any, x: Tensor, c: Tensor, given: Any) -> Tensor:
        starts = {start: k for k, (start, stop) in enumerate(self.ranges) if stop > start}
        v = 0
        while v < len(blocks):
            if v in starts:
                k = starts[v]
                x = self._segment(k, blocks, x, c, given)
                v = self.ranges[k][1]
            else:
                x, c = self.model._visit(blocks[v], v, x, c, given)
                v += 1
        return x

    def _segment(self, k: int, blocks: Any, x: Tensor, c: Tensor, given: Any) -> Tensor:
        order, beta, bound = self.reuse.order, self.reuse.beta, self.reuse.bound
        history = self.histories[k]
        if self.i == 0 or self.plans[k][self.i]:
            entered = x
            for v in range(*self.ranges[k]):
                x, c = self.model._visit(blocks[v], v, x, c, given)
            history.insert(0, (self.t, x - beta * entered if beta else x))
            return x
        weights = expected_weights(order, bound, [t for t, _ in history[: order + 1]], self.t)
        if weights == [1.0]:
            total = history[0][1]
        else:
            total = sum(w * value for w, (_, value) in zip(weights, history, strict=False))  # type: ignore[assignment]
        return total + beta * x if beta else total

    def outputs(self, run: Run) -> list[Tensor]:
        """All steps of a run."""
        self.model.__dict__["walk"] = self
        found = []
        steps = None
        with torch.no_grad():
            for self.i, self.t in enumerate(run.times):
                steps = steps or run.steps(self.model)
                found.append(next(steps))
        return found


@st.composite
def plain_cases(draw: Any) -> tuple[Case, list[tuple[int, int]], list[Policy[Any]], Any]:
    """A plain stack with several segments, each with a policy of its own, and one reuse."""
    spec = draw(stack_specs(("list", "nested", "indexed"), plain=True))
    cuts = sorted(draw(st.sets(st.integers(0, spec.depth), min_size=2, max_size=4)))
    ranges = list(zip(cuts, cuts[1:], strict=False))
    theirs = [draw(policies()) for _ in ranges]
    reuse = draw(
        st.builds(
            Forecast,
            order=st.integers(0, 3),
            beta=st.sampled_from((0.0, 0.5, 1.0)),
            bound=st.sampled_from((1.5, 5.0, 50.0)),
        )
    )
    written = [cachekit.Segment(*pair, policy=policy) for pair, policy in zip(ranges, theirs, strict=True)]
    return Case(spec, every(1), written, reuse, True), ranges, theirs, reuse


@given(plain_cases(), runs)
def test_equal_to_the_loop_written_by_hand(drawn: tuple[Case, list[tuple[int, int]], list[Policy[Any]], Any], run: Run) -> None:
    case, ranges, theirs, reuse = drawn
    run = replace(run, dtype=torch.float64)
    plans = [list(cachekit.plan(policy, run.times)) for policy in theirs]
    expected = Reference(build(case.spec).double(), ranges, plans, reuse).outputs(run)
    ours = case.run(case.wrap(build(case.spec).double()), run)
    if reuse.order == 0 and reuse.beta == 0:
        assert equal(ours, expected)
    # Else the two sum up in different orders: rounding, weighed by at most 50 at each of at most 12 steps in a row.
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@given(stack_specs(), runs, policies(), reuses(betas=(0.0,)))
def test_the_whole_prediction_equals_a_loop_around_the_model(spec: StackSpec, run: Run, policy: Policy[Any], reuse: Any) -> None:
    reuse = cachekit.reuse.parse_reuse(reuse)
    run = replace(run, dtype=torch.float64)
    model, plain = build(spec).double(), build(spec).double()
    cachekit.wrap(model, policy, segments="model", reuse=reuse)
    history: list[tuple[float, Tensor]] = []
    x, y = noise(spec, run.batch, run.seed, dtype=run.dtype), conditioning(spec, run.batch, run.seed)
    with torch.no_grad(), session(model, run.times):
        for i, (t, recompute) in enumerate(zip(run.times, cachekit.plan(policy, run.times), strict=True)):
            given = x, given_time(spec, t, run.batch), y
            ours = tensor_of(model(*given))
            if i == 0 or recompute:
                expected = tensor_of(plain(*given))
                history.insert(0, (t, expected))
            else:
                weights = expected_weights(reuse.order, reuse.bound, [t for t, _ in history[: reuse.order + 1]], t)
                expected = sum(w * value for w, (_, value) in zip(weights, history, strict=False))  # type: ignore[assignment]
            assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-9)
            x = advance(x, ours, 50)


# 11. Policies.


def _decisions(policy: Policy[Any], trace: Sequence[float], changes: Sequence[float]) -> list[bool]:
    """The three functions on a trace; the first step is the session's to recompute."""
    state, found, before, since = policy.init(), [], None, 0.0
    for i, (t, moved) in enumerate(zip(trace, changes, strict=True)):
        since += moved
        step = Step(i=i, t=t, steps=len(trace), range=1000, previous_t=before, probe=lambda since=since: since)
        recompute = policy.decide(state, step) or i == 0
        assert policy.decide(state, step) or i == 0 or not recompute, "decide must be pure"
        state = policy.update(state, step, recompute)
        since, before = 0.0 if recompute else since, t
        found.append(recompute)
    return found


traces = schedules().flatmap(
    lambda times: st.tuples(st.just(times), st.lists(st.floats(0, 0.5), min_size=len(times), max_size=len(times)))
)


@given(policies(probe=True), policies(probe=True), traces)
def test_combinations_commute(a: Policy[Any], b: Policy[Any], trace: tuple[Any, Any]) -> None:
    assert _decisions(a | b, *trace) == _decisions(b | a, *trace)
    assert _decisions(a & b, *trace) == _decisions(b & a, *trace)


@given(policies(probe=True), traces)
def test_a_policy_combined_with_itself_is_itself(a: Policy[Any], trace: tuple[Any, Any]) -> None:
    assert _decisions(a | a, *trace) == _decisions(a, *trace) == _decisions(a & a, *trace)


stateless = st.one_of(
    st.builds(every, st.integers(1, 4)),
    st.builds(first, st.integers(0, 4)),
    st.builds(last, st.integers(0, 3)),
    st.builds(outside, st.integers(400, 900), st.integers(0, 400)),
)


@given(stateless, stateless, schedules())
def test_stateless_policies_recompute_a_superset(a: Policy[Any], b: Policy[Any], times: tuple[float, ...]) -> None:
    one, other, either, both = (list(cachekit.plan(p, times)) for p in (a, b, a | b, a & b))
    for i in range(1, len(times)):
        assert either[i] == (one[i] or other[i])
        assert both[i] == (one[i] and other[i])


@given(st.integers(1, 5), schedules(max_size=30))
def test_every_and_at_most_are_literal(n: int, times: tuple[float, ...]) -> None:
    assert list(cachekit.plan(every(n), times)) == [i % n == 0 for i in range(len(times))]
    # at_most(n): never more than n reused steps in a row, and no recompute before they are used up.
    assert list(cachekit.plan(at_most(n), times)) == [i % (n + 1) == 0 for i in range(len(times))]


@given(st.integers(0, 5), st.integers(0, 1000), st.integers(0, 1000), schedules(max_size=30))
def test_first_last_and_outside_are_literal(k: int, start: int, close: int, times: tuple[float, ...]) -> None:
    n = len(times)
    assert list(cachekit.plan(first(k), times))[1:] == [i < k for i in range(1, n)]
    assert list(cachekit.plan(last(k), times))[1:] == [i >= n - k for i in range(1, n)]
    assume(start > close)
    # As in the authors' code, the lower bound takes effect one call late.
    late = [t >= start or before < close for before, t in zip(times, times[1:], strict=False)]
    assert list(cachekit.plan(outside(start, close), times))[1:] == late


@given(stack_specs(), policies() | st.sampled_from(STRINGS), runs)
def test_plan_says_what_a_wrapped_model_does(spec: StackSpec, policy: Any, run: Run) -> None:
    model = cachekit.wrap(build(spec), policy, segments="all", reuse="output")
    with session(model, run.times):
        run.outputs(model)
    records = stats(model).records
    assert [record.t for record in records] == list(run.times)
    assert [all(record.recomputed) for record in records] == list(cachekit.plan(policy, run.times))


@given(cases(), runs)
def test_change_watches_the_block_before_the_segment(case: Case, run: Run) -> None:
    """A threshold of 0 recomputes always, one beyond reach never again."""
    n = len(visits_of(build(case.spec)))
    # A refiner in front sees the conditioning alone, which stands still.
    assume(n >= 2 and case.spec.layout != "refiner")
    for threshold, always in ((0.0, True), (1e30, False)):
        model = case.wrap(policy=change(threshold), segments=(1, n))
        case.run(model, run)
        assert [all(record.recomputed) for record in stats(model).records[1:]] == [always] * (len(run.times) - 1)


# 12. Modes.


def _mode(name: str) -> contextlib.AbstractContextManager[Any]:
    modes: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    return modes[name]()


@given(cases(), runs)
def test_inference_mode_changes_nothing(case: Case, run: Run) -> None:
    model = case.wrap()
    with torch.inference_mode():
        ours = case.run(model, run)
    expected = case.run(case.wrap(), run)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    # What was made of inference tensors is gone with its generation.
    assert equal(case.run(model, replace(run, seed=run.seed + 60)), case.run(case.wrap(), replace(run, seed=run.seed + 60)))


@given(cases(), runs, st.sampled_from(("no_grad", "inference_mode", "autocast")))
def test_every_1_is_bit_equal_in_every_mode(case: Case, run: Run, mode: str) -> None:
    with torch.no_grad(), _mode(mode):
        assert equal(case.run(case.wrap(policy=every(1)), run), run.outputs(build(case.spec)))
        assert torch.equal(case.run(case.wrap(), run)[0], run.outputs(build(case.spec))[0])


@given(cases(betas=(0.0,)), runs)
def test_half_precision_repeats_bit_by_bit(case: Case, run: Run) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stored, reused = _repeated(case, run)
    assert torch.equal(stored, reused)


# Errors.


@given(stack_specs())
@settings(max_examples=5)
def test_what_cannot_be_meant_is_refused(spec: StackSpec) -> None:
    for wrong in ({"policy": "skip-evry-2"}, {"segments": "centre"}, {"reuse": "taylor"}):
        model = build(spec)
        before = _snapshot(model)
        with pytest.raises(cachekit.CachekitError):
            cachekit.wrap(model, **wrong)  # type: ignore[arg-type]
        assert _identical(before, _snapshot(model))


def _unused() -> Iterator[None]:
    yield None
