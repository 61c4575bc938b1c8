"""What policies look at: declared, compared with what it was, and found without knowing a block's arguments."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from original_zoo import HUNYUAN_VIDEO as ORIGINAL_HUNYUAN_VIDEO
from published import Range, change, run
from running import generate
from torch import Tensor, nn
from zoo import CASES, DIT, FLUX, WAN

import cachekit
from cachekit import Comparison, Signal
from cachekit.decisions import Decisions
from cachekit.policies import accumulated, at_most
from cachekit.policy import Policy, Preset, Step
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


def tea(threshold: float = 0.3) -> Preset:
    return Preset(accumulated(threshold, pooled=True), segments="all", reuse="residual")


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


@pytest.mark.parametrize("case", (*CASES, ORIGINAL_HUNYUAN_VIDEO), ids=str)
def test_the_modulated_input_is_found_on_every_architecture(case: Case) -> None:
    """With no word about the block's arguments; every number is finite from the second step on, and falls with the step."""
    wide, narrow = ([980.0, 960.0 - gap, 940.0 - 2 * gap] for gap in (300.0, 0.0))
    found = []
    for times in (wide, narrow):
        seen: list[dict[Signal, tuple[float, ...]]] = []
        watched = Signal("modulated", since="step")
        model = cachekit.wrap(case.build(), Noting((watched,), seen), segments="all", reuse="output")
        with model.cachekit.session(), model.cachekit.branch("only"):
            generate(model, case, times)
        assert not model.cachekit.stats.notes
        assert seen[0][watched][0] == inf and all(0 < step[watched][0] < 3 for step in seen[1:])
        found.append(seen[1][watched][0])
    assert found[1] < found[0]


class Block(nn.Module):
    """Writes into its input before its attention, where it is told to, and counts how often it got to its end."""

    def __init__(self, writes: bool, name: str = "attn") -> None:
        super().__init__()
        self.norm, self.mlp, self.writes, self.name, self.finished = nn.LayerNorm(8), nn.Linear(8, 8), writes, name, 0
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.writes:
            x.add_(0.1)
        else:
            x = x + 0.1
        x = x + self.get_submodule(self.name)(self.norm(x) * (1 + t))
        self.finished += 1
        result: Tensor = x + self.mlp(x)
        return result


class Model(nn.Module):
    def __init__(self, writes: bool = False, name: str = "attn") -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 8), nn.ModuleList([Block(writes, name) for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, t / 1000)
        result: Tensor = self.head(h)
        return result


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return Model(**options).eval()


def predictions(model: Any, times: Sequence[float] = TIMES) -> list[Tensor]:
    noise, data = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    with model.cachekit.session(steps=len(times)):
        return [model(noise * (t / 1000) + data * (1 - t / 1000), torch.tensor(t)).clone() for t in times]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_looking_in_writes_nothing_and_runs_no_block_to_its_end() -> None:
    """A block that writes into its input gets a copy of it for the look; its end is reached on full steps only."""
    writing, plain = (cachekit.wrap(small(writes=writes), tea(0.2)) for writes in (True, False))
    assert same(predictions(writing), predictions(plain))
    full = [all(record.recomputed) for record in plain.cachekit.stats.records]
    assert full == [all(record.recomputed) for record in writing.cachekit.stats.records]
    assert 1 < sum(full) < len(TIMES)
    assert [block.finished for block in plain.blocks] == [sum(full)] * 3


def test_a_module_of_another_name_is_named_by_the_adapter() -> None:
    expected = predictions(cachekit.wrap(small(), tea(0.2)))
    named = cachekit.wrap(small(name="mix"), tea(0.2), adapter=cachekit.Adapter(modulated=("mix",)))
    assert same(predictions(named), expected)


def test_where_it_is_not_found_every_step_is_full_and_a_note_says_so() -> None:
    """Nothing is reused on a guess."""
    model = cachekit.wrap(small(name="mix"), tea(0.2))
    assert same(predictions(model), predictions(cachekit.wrap(small(name="mix"), "every-1")))
    assert all(all(record.recomputed) for record in model.cachekit.stats.records)
    assert any("attention of block 'blocks.0' could not be seen" in note for note in model.cachekit.stats.notes)


class Raising(Block):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if float(t) < 0.5:
            raise RuntimeError("out of order")
        result: Tensor = super().forward(x, t)
        return result


def test_an_error_on_the_way_there_is_the_models_own() -> None:
    """It comes out as it is, and the next generation looks again."""
    model = small()
    torch.manual_seed(0)
    model.blocks[0] = Raising(writes=False)
    cachekit.wrap(model, tea(0.2))
    with pytest.raises(RuntimeError, match="out of order"):
        predictions(model)
    high = [t for t in TIMES if t >= 500]
    found = predictions(model, high)
    model.cachekit.reset()
    assert same(predictions(model, high), found)
    assert model.blocks[0].finished < 3 * len(high)


@pytest.mark.parametrize("how", ("block.compile()", "torch.compile(block)"))
@pytest.mark.parametrize("first", ("wrap", "compile"))
def test_compiled_blocks_are_looked_into_by_their_own_code(how: str, first: str) -> None:
    """Decisions and predictions are those of blocks that are not compiled."""
    expected = cachekit.wrap(small(), tea(0.2))
    found = predictions(expected)
    model = small()
    if first == "wrap":
        cachekit.wrap(model, tea(0.2))
    for k, block in enumerate(model.blocks):
        if how == "block.compile()":
            block.compile(backend="eager")
        else:
            model.blocks[k] = torch.compile(block, backend="eager")
    if first == "compile" or how == "torch.compile(block)":
        cachekit.wrap(model, tea(0.2))
    assert same(predictions(model), found)
    assert model.cachekit.stats.records == expected.cachekit.stats.records
    assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total and not model.cachekit.stats.notes


def test_unwrap_restores_the_modules_inside_too() -> None:
    model = DIT.build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    recomputed(cachekit.wrap(model, tea()), DIT)
    assert "forward" in model.transformer_blocks[0].attn1.__dict__
    cachekit.unwrap(model)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {name: list(entries) for name, entries in after.items()} == {name: list(entries) for name, entries in before.items()}
    assert "forward" not in model.transformer_blocks[0].attn1.__dict__


def test_nothing_inside_is_touched_where_no_policy_looks_there() -> None:
    model = cachekit.wrap(DIT.build(), "first-block-0.1")
    assert "forward" not in model.transformer_blocks[0].attn1.__dict__


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("deepcopy", "pickle"))
def test_copies_look_into_their_own_blocks(copied: Any) -> None:
    original = cachekit.wrap(DIT.build(), tea())
    full = recomputed(original, DIT)
    duplicate = copied(original)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(1.3)
    scaled = DIT.build()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.3)
    expected = recomputed(cachekit.wrap(scaled, tea()), DIT)
    assert recomputed(duplicate, DIT) == expected
    assert recomputed(original, DIT) == full


def test_threads_look_for_themselves() -> None:
    """One model, two generations of other timesteps at once: each as if alone."""
    schedules = (TIMES, tuple(float(t) for t in range(990, 300, -60)))
    model = cachekit.wrap(small(), tea(0.2))
    expected = [predictions(cachekit.wrap(small(), tea(0.2)), times) for times in schedules]
    found: dict[int, list[Tensor]] = {}

    def work(k: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                found[k] = predictions(model, schedules[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[k], expected[k]) for k in (0, 1))


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


def test_a_change_of_shape_in_mid_generation_recomputes() -> None:
    """Another number of tokens: what was seen before is compared with nothing."""
    model = cachekit.wrap(small(), tea(9.0))
    with model.cachekit.session(steps=4), model.cachekit.branch("only"):
        for t, tokens in ((900.0, 5), (800.0, 5), (700.0, 7), (600.0, 7)):
            x = torch.ones(2, tokens, 4) * t / 1000
            model(x, torch.tensor(t))
    assert [all(record.recomputed) for record in model.cachekit.stats.records] == [True, False, True, False]
