"""What policies look at: declared before it is read, compared with what it was, and counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from published import MAIN, OUTPUTS, Range, change, run
from running import generate
from torch import Tensor, nn
from zoo import DIT, FLUX, LATTE, WAN

import cachekit
from cachekit import Comparison, Signal
from cachekit.decisions import Decisions
from cachekit.policies import accumulated, at_most
from cachekit.policy import Policy, Step
from cachekit.samples import Samples
from cachekit.signals import Compared

TIMES = tuple(float(t) for t in range(950, 100, -70))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def recomputed(model: Any, case: Case, times: Sequence[float] = TIMES, block: int = 1) -> list[bool]:
    """Which steps of one generation ran a block."""
    with model.cachekit.session(steps=len(times)), model.cachekit.branch("only"):
        generate(model, case, times)
    return [record.recomputed[block] for record in model.cachekit.stats.records]


@dataclass(frozen=True)
class Noting(Policy[None]):
    """Reads all numbers of its signals in update, and appends them to what the test gave it; recomputes every other step."""

    watched: tuple[Signal, ...]
    seen: list[dict[Signal, tuple[float, ...]]] = field(compare=False)

    def decide(self, state: None, step: Step) -> bool:
        return step.i % 2 == 0

    def update(self, state: None, step: Step, recomputed: bool) -> None:
        found = {signal: step.pooled.signal(signal) for signal in self.watched}
        self.seen.append({signal: (c.relative, c.difference, c.size) for signal, c in found.items()})

    def required(self) -> frozenset[str | Signal]:
        return frozenset(self.watched)


NUMBERS = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


@given(NUMBERS, NUMBERS)
def test_numbers_of_a_comparison(now: list[float], then: list[float]) -> None:
    """Each is a loop over the elements, in float64, and costs one reading however often it is read."""
    read: list[Tensor] = []
    value, reference = torch.tensor(now, dtype=torch.float64), torch.tensor(then, dtype=torch.float64)
    compared = Comparison(Compared(value, reference, Samples(1, 1), read.append))
    differences = [abs(a - b) for a, b in zip(now, then, strict=True)]
    assert compared.difference == pytest.approx(sum(differences) / 3)
    assert compared.size == pytest.approx(sum(map(abs, now)) / 3)
    elements = [d / (abs(b) + 1e-10) for d, b in zip(differences, then, strict=True)]
    assert compared.elementwise == pytest.approx(sum(elements) / 3)
    if sum(map(abs, then)) > 1e-100:
        assert compared.relative == pytest.approx(sum(differences) / sum(map(abs, then)))
        squares = [sum(x * x for x in xs) for xs in (differences, then)]
        if squares[1] > 1e-200:
            assert compared.euclidean == pytest.approx((squares[0] / squares[1]) ** 0.5)
    before = len(read)
    assert (compared.difference, compared.size, compared.elementwise) == (compared.difference, compared.size, compared.elementwise)
    assert len(read) == before <= 5


@pytest.mark.parametrize("pair", ((None, torch.ones(2)), (torch.ones(2), None), (torch.ones(2), torch.ones(3))))
def test_what_is_missing_or_of_another_shape_is_infinitely_far(pair: tuple[Any, Any]) -> None:
    compared = Comparison(Compared(*pair, Samples(1, 1), lambda number: None))
    assert compared.relative == compared.difference == compared.elementwise == compared.euclidean == inf
    assert compared.size == (inf if pair[0] is None else 1.0)


@pytest.mark.parametrize("since", ("recompute", "step"))
@pytest.mark.parametrize("case", (FLUX, WAN), ids=str)
def test_input_and_output_are_those_that_the_caller_sees(case: Case, since: Any) -> None:
    """Measured from outside the model: against the last recompute (every other step), or against the step before."""
    watched = (Signal("sample", since), Signal("prediction", since))
    seen: list[dict[Signal, tuple[float, ...]]] = []
    model = cachekit.wrap(case.build(), Noting(watched, seen), segments="all", reuse="output")
    with model.cachekit.session(), model.cachekit.branch("only"):
        predictions = generate(model, case, TIMES)
    samples = [case.sample(t, start=TIMES[0]) for t in TIMES]
    for i, found in enumerate(seen):
        before = i - 1 if since == "step" else (i - 1) // 2 * 2
        for signal, values in zip(watched, (samples, predictions), strict=True):
            relative, difference, size = found[signal]
            assert size == float(values[i].abs().mean())
            if i == 0:
                assert relative == difference == inf
            else:
                assert relative == change(values[i], values[before])
                assert difference == float((values[i] - values[before]).abs().mean())


def adds(case: Case, block: nn.Module, found: list[Tensor]) -> Callable[..., None]:
    """A hook that notes what a block adds to the main stream."""
    names = OUTPUTS[case.name]

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        entered = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments[MAIN]
        left = result[names.index(MAIN)] if isinstance(result, tuple) else result
        found.append(left - entered)

    return note


@settings(max_examples=20)
@given(
    st.sampled_from((DIT, WAN, LATTE, FLUX)),
    st.integers(0, 2),
    st.sampled_from((None, -1, 3, 4)),
    st.sampled_from(("recompute", "step")),
    st.sampled_from(("output", "residual", "taylor-1")),
)
def test_the_middle_of_any_segment_is_what_its_block_adds(case: Case, start: int, stop: int | None, since: Any, reuse: str) -> None:
    """At recomputes, every second step, bit for bit what a hook on the block sees; at the others there is nothing to see."""
    model, unit = case.build(), 2 if case is LATTE else 1
    stop = None if case is LATTE else stop
    start = min(start, 1) if case is LATTE else start
    covered = range(len(case.stack))[start * unit : stop]
    middle = model.get_submodule(case.stack[covered[(len(covered) - 1) // 2]])
    watched, seen, added = Signal("middle", since), list[dict[Signal, tuple[float, ...]]](), list[Any]()
    cachekit.wrap(model, Noting((watched,), seen), segments=(start, stop), reuse=reuse)
    # Called where the block runs; where its result is reused, a hook may be called as well.
    handle = middle.register_forward_hook(adds(case, middle, added), with_kwargs=True)
    with model.cachekit.session(), model.cachekit.branch("only"):
        generate(model, case, TIMES)
    handle.remove()
    computed = added[::2] if len(added) == len(TIMES) else added
    assert len(computed) == len(TIMES[::2])
    for i, found in enumerate(seen):
        relative, difference, size = found[watched]
        if i % 2:
            assert relative == difference == size == inf
        elif i == 0:
            assert relative == difference == inf and size == float(computed[0].abs().mean())
        else:
            assert relative == change(computed[i // 2], computed[i // 2 - 1])
            assert size == float(computed[i // 2].abs().mean())


class Added:
    """The changes of what is in front of a range, or of the sample, from step to step, added up."""

    def __init__(self, threshold: float, samples: Sequence[Tensor] | None = None) -> None:
        self.threshold, self.samples = threshold, samples
        self.sum = 0.0
        self.before: Tensor | None = None

    def __call__(self, front: Tensor, i: int, t: float) -> bool:
        now = front if self.samples is None else self.samples[i]
        full = self.before is None
        if self.before is not None:
            self.sum += change(now, self.before)
            full = self.sum >= self.threshold
        self.sum = 0.0 if full else self.sum
        self.before = now
        return full


@settings(max_examples=12)
@given(
    st.sampled_from((DIT, FLUX, WAN)),
    st.sampled_from(("probe", "front", "sample")),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.lists(st.integers(20, 990), min_size=2, max_size=10, unique=True),
)
def test_any_signal_accumulates(case: Case, signal: Any, threshold: float, start: int, drawn: list[int]) -> None:
    """Bit for bit as the loop has it."""
    times = [float(t) for t in sorted(drawn, reverse=True)]
    start = 1 if signal == "probe" else start
    samples = [case.sample(t, start=times[0]) for t in times] if signal == "sample" else None
    held = Range(start, 6, Added(threshold, samples))
    expected = run(case, case.build(), times, [held])
    model = cachekit.wrap(case.build(), accumulated(threshold, signal=signal, pooled=True), segments=(start, 6), reuse="residual")
    with model.cachekit.session(), model.cachekit.branch("only"):
        found = generate(model, case, times)
    assert [record.recomputed[start] for record in model.cachekit.stats.records] == held.recomputed
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("spec", ("teacache-0.4", "easycache-0.2", "speca-3", "first-block-0.2"))
def test_every_number_that_is_read_is_counted_once(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on a device for which reading waits. What is asked for in vain, or not at all, costs nothing."""
    monkeypatch.setattr(Decisions, "_count", lambda self, number: setattr(self, "waits", self.waits + 1))
    model = cachekit.wrap(FLUX.build(), spec)
    with model.cachekit.session(steps=len(TIMES)), model.cachekit.branch("only"):
        generate(model, FLUX, TIMES)
    full = [record.recomputed[1] for record in model.cachekit.stats.records]
    n, fulls = len(TIMES), sum(full)
    assert fulls < n
    # TeaCache: the first and the last step are full whatever it shows. EasyCache: the first step has nothing to compare with but
    # a size of its own, and five more are full whatever it shows. SpeCa: at reuses alone.
    expected = {"teacache": n - 2, "easycache": 1 + 3 * (fulls - 1) + n - 6, "speca": n - fulls, "first-block": n - 1}
    assert model.cachekit.stats.synchronisations == expected[spec.rpartition("-")[0]]


def test_what_is_known_to_update_only_is_infinite_in_decide() -> None:
    """And known afterwards, in the same step."""
    watched, read = Signal("prediction", since="step"), list[tuple[str, float]]()

    class Early(Policy[None]):
        needs: ClassVar[frozenset[str | Signal]] = frozenset({watched})

        def decide(self, state: None, step: Step) -> bool:
            read.append(("decide", step.signal(watched).relative))
            return True

        def update(self, state: None, step: Step, recomputed: bool) -> None:
            read.append(("update", step.signal(watched).relative))

    recomputed(cachekit.wrap(FLUX.build(), Early()), FLUX)
    assert read[0] == ("update", inf) and len(read) == 2 * len(TIMES) - 1
    assert all((when == "decide") == (value == inf) for when, value in read[1:])


def test_what_is_not_declared_is_not_shown() -> None:
    class Reading(Policy[None]):
        needs: ClassVar[frozenset[str | Signal]] = frozenset({Signal("sample")})

        def decide(self, state: None, step: Step) -> bool:
            return step.signal(Signal("prediction")).relative > 1

    with pytest.raises(cachekit.ConfigError, match=r"Signal\(of='prediction', since='recompute'\) is read, but not declared"):
        recomputed(cachekit.wrap(DIT.build(), Reading()), DIT)

    class Forgetful(Policy[None]):
        def decide(self, state: None, step: Step) -> bool:
            return step.change > 1

    with pytest.raises(cachekit.ConfigError, match=r"Signal\(of='probe', since='recompute'\) is read, but not declared"):
        recomputed(cachekit.wrap(DIT.build(), Forgetful()), DIT)


def test_a_decision_on_the_whole_prediction_falls_before_any_block() -> None:
    for policy in ("accumulated-0.2", accumulated(0.2) | at_most(3)):
        with pytest.raises(cachekit.ConfigError, match="before any block"):
            cachekit.wrap(DIT.build(), policy, segments="model")
    with pytest.raises(cachekit.ConfigError, match="the block before the segment"):
        cachekit.wrap(DIT.build(), accumulated(0.2, signal="front"), segments="model")
    assert cachekit.wrap(DIT.build(), accumulated(0.2, signal="sample"), segments="model").cachekit.stats.steps == 0


@pytest.mark.parametrize("spec", ("accumulated-0.2", "easycache-0.1", "speca-0.1"))
def test_there_is_no_plan_without_a_model(spec: str) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"there is none here: plan\(\) takes policies of time alone"):
        cachekit.plan(spec, TIMES)
