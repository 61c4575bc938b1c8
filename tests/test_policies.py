"""Policies over random schedules: what each says literally, how they combine, and that a wrapped model does what plan() shows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawing import STRINGS, heun, limits, policies, probes, runs, schedules, stack_specs, stateless
from hypothesis import assume, given
from hypothesis import strategies as st
from stack_blocks import StackSpec
from stack_runs import Run
from stacks import build, visits_of
from torch import Tensor
from wrapping import Case, cases, handle, stats

import cachekit
from cachekit.policies import at_most, change, every, first, front_change, last, moved, outside, skip_every, tail
from cachekit.policy import Policy, Step
from cachekit.preset import Preset

Trace = tuple[tuple[float, ...], list[float]]
traces = schedules().flatmap(
    lambda times: st.tuples(st.just(times), st.lists(st.floats(0, 0.5), min_size=len(times), max_size=len(times)))
)


def decisions(policy: Policy[Any], trace: Trace) -> list[bool]:
    """The three functions on a trace of timesteps and changes since the step before; the first step is the session's."""
    times, changes = trace
    state, found, before, since = policy.init(), [], None, 0.0
    for i, (t, by) in enumerate(zip(times, changes, strict=True)):
        since += by
        shown: Any = SimpleNamespace(relative=since)
        step = Step(i, t, len(times), 1000, before, i, look=partial(lambda found, signal: found, shown))
        recompute = i == 0 or policy.decide(state, step)
        assert i == 0 or policy.decide(state, step) == recompute, "decide must be pure"
        state = policy.update(state, step, recompute)
        since, before = 0.0 if recompute else since, t
        found.append(recompute)
    return found


@given(policies(probe=True), policies(probe=True), traces)
def test_combinations_commute(a: Policy[Any], b: Policy[Any], trace: Trace) -> None:
    """Since each learns the combined decision, it does not matter who is asked first."""
    assert decisions(a | b, trace) == decisions(b | a, trace)
    assert decisions(a & b, trace) == decisions(b & a, trace)


@given(policies(probe=True), policies(probe=True), policies(probe=True), traces)
def test_combinations_associate(a: Policy[Any], b: Policy[Any], c: Policy[Any], trace: Trace) -> None:
    """``a | b | c`` needs no parentheses, and neither does ``a & b & c``."""
    assert decisions((a | b) | c, trace) == decisions(a | (b | c), trace)
    assert decisions((a & b) & c, trace) == decisions(a & (b & c), trace)


@given(policies(probe=True), traces)
def test_a_policy_combined_with_itself_is_itself(a: Policy[Any], trace: Trace) -> None:
    """Under ``|`` and under ``&``."""
    assert decisions(a | a, trace) == decisions(a, trace) == decisions(a & a, trace)


@given(stateless, stateless, schedules())
def test_stateless_policies_recompute_a_superset(a: Policy[Any], b: Policy[Any], times: tuple[float, ...]) -> None:
    """Where policies have no state, ``|`` and ``&`` are those of their decisions, step by step."""
    one, other, either, both = (list(cachekit.plan(p, times)) for p in (a, b, a | b, a & b))
    for i in range(1, len(times)):
        assert either[i] == (one[i] or other[i])
        assert both[i] == (one[i] and other[i])


@given(policies(probe=True), st.integers(0, 4), traces)
def test_at_most_limits_whatever_it_is_joined_to(policy: Policy[Any], n: int, trace: Trace) -> None:
    """``p | at_most(n)`` never reuses more than n times in a row."""
    reused = [len(list(steps)) for full, steps in groupby(decisions(policy | at_most(n), trace)) if not full]
    assert max(reused, default=0) <= n


@given(policies(), st.floats(0.05, 1.0), traces)
def test_change_keeps_what_has_accumulated_below_the_threshold(policy: Policy[Any], threshold: float, trace: Trace) -> None:
    """Joined to anything: since the last recompute, whoever asked for it, nothing has changed by more."""
    since = 0.0
    for full, by in zip(decisions(policy | change(threshold), trace), trace[1], strict=True):
        since = 0.0 if full else since + by
        assert since <= threshold


@given(st.integers(1, 5), st.integers(0, 5), schedules(max_size=30))
def test_literal_ones_over_any_schedule(n: int, k: int, times: tuple[float, ...]) -> None:
    """every, at_most, first and last look at the number of the step alone; the first step is always full."""
    steps = range(len(times))
    assert list(cachekit.plan(every(n), times)) == [i % n == 0 for i in steps]
    assert list(cachekit.plan(at_most(k), times)) == [i % (k + 1) == 0 for i in steps]
    assert list(cachekit.plan(first(k), times)) == [i < k or i == 0 for i in steps]
    assert list(cachekit.plan(last(k), times)) == [i >= len(times) - k or i == 0 for i in steps]


@given(st.integers(0, 1000), st.integers(0, 1000), schedules(max_size=30))
def test_outside_looks_at_t(start: int, close: int, times: tuple[float, ...]) -> None:
    """As in the authors' code, the lower bound takes effect one call late."""
    late = [t >= start or before < close for before, t in pairwise(times)]
    assert list(cachekit.plan(outside(start, close), times))[1:] == late


@given(st.integers(1, 6), schedules(min_size=1, max_size=60))
def test_the_preset_is_what_its_guards_and_its_period_say(n: int, times: tuple[float, ...]) -> None:
    """Three full steps, then one in every n, and a tail of 6 % and at least two; but none that has not moved by half a stride."""
    found, steps = list(cachekit.plan(f"skip-every-{n}", times)), len(times)
    guarded, last, wanted = max(2, -(-6 * steps // 100)), 0, []
    for i, t in enumerate(times):
        due = i - last >= n or i >= steps - guarded
        near = n > 1 and times[last] - t < 0.5 * 1000 / steps
        wanted.append(i < 3 or (due and not near))
        last = i if wanted[-1] else last
    assert found == wanted


@given(st.integers(1, 6), st.integers(3, 100))
def test_on_an_even_grid_the_preset_is_its_guards_and_its_period(n: int, steps: int) -> None:
    """There no step lies closer than half a stride."""
    found = list(cachekit.plan(f"skip-every-{n}", [1000 - 1000 * i / steps for i in range(steps)]))
    guarded = max(2, -(-6 * steps // 100))
    assert all(full for i, full in enumerate(found) if i < 3 or i >= steps - guarded)
    between = range(3, steps - guarded)
    assert [found[i] for i in between] == [(i - 2) % n == 0 for i in between]


@given(st.integers(0, 3), schedules(min_size=1, max_size=30))
def test_moved_counts_from_the_last_recompute(strides: int, times: tuple[float, ...]) -> None:
    """In strides of the range over the number of steps; where either is unknown it says nothing against a recompute."""
    last, wanted = times[0], []
    for t in times:
        wanted.append(t == times[0] or last - t >= strides * 1000 / len(times))
        last = t if wanted[-1] else last
    assert list(cachekit.plan(moved(strides), times)) == wanted
    assert all(cachekit.plan(moved(strides), times, range=None))


@given(stack_specs(), policies() | st.sampled_from(STRINGS), runs, st.sampled_from((None, 1000)), st.booleans())
def test_a_wrapped_model_does_what_plan_shows(spec: StackSpec, policy: Any, run: Run, reach: Any, twice: bool) -> None:
    """In a session that knows its steps: also with two evaluations a step, with and without a known range of t."""
    run = replace(run, times=heun(run.times) if twice else run.times)
    model = cachekit.wrap(build(spec), policy, segments="all", reuse="output", adapter=cachekit.Adapter(range=reach))
    with handle(model).session(timesteps=run.times), handle(model).branch("only"):
        run.outputs(model)
    assert [record.t for record in stats(model).records] == list(run.times)
    assert [all(record.recomputed) for record in stats(model).records] == list(cachekit.plan(policy, run.times, range=reach))
    assert not stats(model).notes


@given(stack_specs(), st.integers(1, 4), schedules(min_size=6, max_size=12), st.sampled_from((None, 1000)), st.booleans())
def test_the_tail_guard_needs_the_steps_or_the_range(
    spec: StackSpec, n: int, times: tuple[float, ...], reach: float | None, known: bool
) -> None:
    """Where neither is known it is off, and stats say so; with the range alone it goes by t."""
    case = Case(replace(spec, tokens=max(spec.tokens, 4)), f"skip-every-{n}", "all", "output", known)
    model = case.wrap(adapter=cachekit.Adapter(range=reach))
    case.run(model, Run(times, batch=4))
    guard: Policy[Any] = tail(0.06) if known else outside(1001, 0)
    if reach is not None and not known:
        guard = _Below(60)
    # Without the number of steps a stride is unknown, and nothing is held back.
    near: Policy[Any] = moved(0.5 if n > 1 else 0.0) if known else every(1)
    expected = cachekit.plan(first(3) | (at_most(n - 1) | guard) & near, times, range=reach)
    assert [all(record.recomputed) for record in stats(model).records] == list(expected)
    assert any("session(steps=...)" in note for note in stats(model).notes) == (not known and reach is None)


class _Below(Policy[None]):
    def __init__(self, t: float) -> None:
        self.t = t

    def decide(self, state: None, step: Step) -> bool:
        return step.t < self.t


@given(cases().map(Case.implicit), st.integers(1, 4), runs)
def test_last_needs_the_steps(case: Case, n: int, run: Run) -> None:
    """A range of t does not tell how many steps are left: without a session ``last`` is off, and stats say so."""
    case = case.under(last(n), "all")
    model = case.wrap(adapter=cachekit.Adapter(range=1000))
    run.outputs(model)
    assert [all(record.recomputed) for record in stats(model).records] == [True] + [False] * (len(run.times) - 1)
    assert any("session(steps=...)" in note for note in stats(model).notes)
    model = replace(case, explicit=True).wrap()
    replace(case, explicit=True).run(model, run)
    assert [all(record.recomputed) for record in stats(model).records] == list(cachekit.plan(last(n), run.times))


@given(cases(), probes | st.builds(lambda a, b: a | b, probes, limits), st.integers(1, 8), runs)
def test_change_follows_the_block_before_the_segment(case: Case, policy: Any, at: int, run: Run) -> None:
    """Measured from outside: the largest mean|r - r_last| / mean|r_last| of a sample, r that block's residual, decides every step.

    Latte's spatial blocks have a row for each frame, a sample's one behind the other; its temporal ones for each token.
    """
    # One visit a block, so that a hook sees the probe once a step, and no block that writes into what a hook compares with.
    case = replace(case, spec=replace(case.spec, order=tuple(range(case.spec.depth)), in_place=frozenset())).wide()
    n = len(visits_of(case.build()))
    assume(n >= 2)
    at = 1 + (at - 1) % (n - 1)
    model = case.under(policy, (at, n)).wrap()
    residuals = _residuals(model, at - 1)
    case.run(model, run)
    threshold, limit = (policy.threshold, len(run.times)) if isinstance(policy, change) else (policy.a.threshold, policy.b.n)
    then, reused = residuals[0], 0
    for now, record in zip(residuals[1:], stats(model).records[1:], strict=True):
        moved = max(
            float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now.chunk(run.batch), then.chunk(run.batch), strict=True)
        )
        assume(abs(moved - threshold) > 1e-5)
        assert all(record.recomputed[at:]) == (moved > threshold or reused >= limit)
        reused = 0 if record.recomputed[at] else reused + 1
        then = now if record.recomputed[at] else then


def _residuals(model: Any, v: int) -> list[Tensor]:
    """Filled with the residual of a visit's block at every call."""
    found: list[Tensor] = []

    def note(block: Any, args: Any, kwargs: Any, result: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        found.append(block.shape.unpack(result)["x"] - entered)

    visits_of(model)[v].register_forward_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("make", [every, first, last, at_most, moved, change, front_change, outside, tail])
def test_a_misspelt_number_is_refused(make: Any) -> None:
    """Not passed over in favour of the default."""
    with pytest.raises(ValueError, match="mistake"):
        make(**{next(iter(make.__dataclass_fields__)): 1, "mistake": 2})


def test_presets_combine_as_policies_do() -> None:
    """What is tuned together stays together: the preset's own reuse is kept."""
    for combined in (skip_every(2) | every(5), every(5) | skip_every(2), skip_every(2) & every(5), every(5) & skip_every(2)):
        assert isinstance(combined, Preset)
        assert combined.reuse == skip_every(2).reuse
    with pytest.raises(TypeError):
        every(2) | "every-3"  # type: ignore[operator]


@given(st.sampled_from(STRINGS), schedules(max_size=20))
def test_plan_takes_what_schedulers_give(policy: str, times: tuple[float, ...]) -> None:
    """Tensors as well as numbers."""
    assert cachekit.plan(policy, torch.tensor(times)) == cachekit.plan(policy, times)  # type: ignore[arg-type]
