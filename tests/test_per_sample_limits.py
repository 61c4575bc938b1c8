"""Decisions for each sample: where they can't be made, what they cost, and the parts that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Shape
from drawing import forecasts, probes, runs, stack_specs
from hypothesis import assume, given
from hypothesis import strategies as st
from published import change as change_of
from stack_blocks import ORDERED, StackSpec
from stack_runs import Run, equal
from stacks import build, visits_of
from torch import Tensor, nn
from wrapping import stats
from zoo import DIT, FLUX

import cachekit
from cachekit.history import History
from cachekit.policies import change, every, first_block
from cachekit.policy import Policy, Step
from cachekit.sample_history import SampleHistory
from cachekit.samples import Part, Samples
from cachekit.signals import Compared, Comparison
from cachekit.sub_batch import SubBatchCall


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_the_change_of_a_sample(count: int, passes: int, rows: int, seed: int) -> None:
    """Of its items the largest, or that of all of them as one; in a loop over samples and passes."""
    generator = torch.Generator().manual_seed(seed)
    now, then = (torch.randn(count * passes * rows, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    samples = Samples(count, passes)
    for g in range(count):
        starts = [(p * count + g) * rows for p in range(passes)]
        items = [(now[start : start + rows], then[start : start + rows]) for start in starts]
        largest = max(change_of(a, b) for a, b in items)
        pooled = change_of(torch.cat([a for a, _ in items]), torch.cat([b for _, b in items]))
        compared = Compared(now, then, samples, lambda _: None)
        assert Comparison(compared, g).relative == pytest.approx(largest, rel=1e-12)
        assert Comparison(compared, g, pooled=True).relative == pytest.approx(pooled, rel=1e-12)


def test_a_change_that_is_no_number_is_nobody_elses() -> None:
    now, then = torch.ones(3, 2), torch.ones(3, 2)
    now[1] = float("nan")
    found = [Comparison(Compared(now, then, Samples(3), lambda _: None), g).relative for g in range(3)]
    assert found[::2] == [0.0, 0.0] and math.isnan(found[1])
    assert math.isnan(Comparison(Compared(now, then, Samples(1, 3), lambda _: None)).relative)


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 99), st.data())
def test_rows_are_taken_and_put_back(count: int, passes: int, rows: int, seed: int, data: st.DataObject) -> None:
    samples = Samples(count, passes)
    whole = torch.randn(count * passes * rows, 2, generator=torch.Generator().manual_seed(seed))
    part = Part(samples, sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    assert part.put(whole, part.take(whole)).equal(whole)
    changed = part.put(whole, part.take(whole) + 1)
    for row in range(len(whole)):
        expected = whole[row] + 1 if row // rows % count in part.chosen else whole[row]
        assert changed[row].equal(expected)


@given(
    st.integers(1, 4),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), min_size=1, max_size=8),
    forecasts((0.0,)),
)
def test_histories_of_samples_are_those_of_each(count: int, passes: int, pushes: list[tuple[int, int]], reuse: Any) -> None:
    """Against a history for each item: any samples at any times, a time given twice among them, and infinite values.

    The same products are added up in another order: a few roundings of 2^-53 of terms at most 50 (the bound) times as large as
    values around 1.
    """
    samples = Samples(count, passes)
    ours, alone = SampleHistory(samples), [History() for _ in range(samples.batch)]
    generator, t = torch.Generator().manual_seed(count), 0.0
    for k, (bits, gap) in enumerate([(15, 0), *pushes]):
        chosen = tuple(g for g in range(count) if bits >> g & 1)
        # A time may stand still: the second evaluation of a solver.
        t += gap
        value = torch.randn(samples.batch * 2, 3, generator=generator, dtype=torch.float64)
        if k % 3 == 2:
            value[0, 0] = float("inf")
        if chosen:
            ours.push(t, value, reuse.length, chosen)
        for item, history in enumerate(alone):
            if item % count in chosen:
                history.push(t, value[2 * item : 2 * item + 2], reuse.length)
        found = ours.value(t + 0.5, reuse, samples.all)
        expected = torch.cat([history.value(t + 0.5, reuse) for history in alone])
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert ours.nbytes == max(len(history.entries) for history in alone) * samples.batch * 2 * 3 * 8


class _Every(Policy[None]):
    """Recompute as the digits of what the model shows say."""

    needs = frozenset({"probe"})

    def decide(self, state: None, step: Step) -> bool:
        return int(step.change * 1000) % 2 == 0


specs = stack_specs().map(lambda spec: replace(spec, in_place=frozenset(), extras=0, tokens=max(spec.tokens, 4)))


@given(specs, runs, st.sampled_from(("output", "residual", "taylor-1")))
def test_rows_that_are_taken_once_are_those_taken_at_every_block(spec: StackSpec, run: Run, reuse: str) -> None:
    """The short way between two blocks against the long one; bit by bit. Inference mode knows the long one alone."""
    assume(len(visits_of(build(spec))) > 1)

    def predictions(mode: Callable[[], Any]) -> list[Tensor]:
        model = cachekit.wrap(build(spec), _Every(), segments=(1, None), reuse=reuse, per_sample=True)
        with mode():
            return list(run.steps(model))

    short = predictions(torch.no_grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubBatchCall, "_note", lambda *_: None)
        assert equal(predictions(torch.no_grad), short)
    assert equal(predictions(torch.inference_mode), short)


@given(stack_specs(layouts=ORDERED, plain=True), probes, runs, st.booleans())
def test_where_a_batch_cannot_be_split_the_largest_change_decides(spec: StackSpec, policy: Any, run: Run, per_sample: bool) -> None:
    """A block that writes into its input, and a mean over the batch: one decision, the same as without ``per_sample``, and said."""
    assume(spec.depth > 1 and len(visits_of(build(spec))) > 1)
    writing = replace(spec, in_place=frozenset(range(spec.depth)), tokens=max(spec.tokens, 4))
    mixing = replace(spec, in_place=frozenset(), extras=1, box="tuple", tokens=max(spec.tokens, 4))
    for each, reason in ((writing, "writes into its arguments"), (mixing, "something else than in the batch")):
        ours = cachekit.wrap(build(each), policy, segments=(1, None), per_sample=True)
        plain = cachekit.wrap(build(each), policy, segments=(1, None))
        assert equal(run.outputs(ours), run.outputs(plain))
        assert [record.recomputed for record in stats(ours).records] == [record.recomputed for record in stats(plain).records]
        assert any(note.startswith("one decision for a whole batch") and reason in note for note in stats(ours).notes)


class _Block(nn.Module):
    """(rows, N, 4), mixed along N and width."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.width = nn.Linear(5, 5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.width(self.tokens(x.mT).mT))


class _Stack(nn.Module):
    """A plain one, of four blocks; the last is left out below t = 500 where it is said to be."""

    def __init__(self, frames: bool = False, shorter: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(4))
        self.frames, self.shorter = frames, shorter

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 2, 5, 4), as B * 2 rows, or as 2 * B, which no batch has whose items lie one behind the other."""
        rows = (x.transpose(0, 1) if self.frames else x).flatten(0, 1)
        for block in list(self.blocks)[: 3 if self.shorter and t < 500 else 4]:
            rows = block(rows)
        return rows.reshape(2, -1, 5, 4).transpose(0, 1) if self.frames else rows.reshape(-1, 2, 5, 4)


def _stack(policy: Any, per_sample: Any, segments: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return cachekit.wrap(_Stack(**options), policy, segments=segments, per_sample=per_sample)


def _three(model: Any) -> list[Tensor]:
    """The predictions of three steps for three samples."""
    noise, data = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [model(noise * t + data * (1 - t), torch.tensor(1000 * t)) for t in (1.0, 0.7, 0.4)]


def test_frames_before_samples_are_not_split() -> None:
    for frames in (False, True):
        model = _stack(every(2), True, frames=frames)
        assert equal(_three(model), _three(_stack(every(2), False, frames=frames)))
        assert any("something else than in the batch" in note for note in model.cachekit.stats.notes) == frames


def test_a_table_as_long_as_the_batch_is_not_split_in_silence() -> None:
    """Six tokens of text have six rows of positions, and there are six samples."""
    shape = Shape(6)
    found = []
    for per_sample in (True, False):
        model = cachekit.wrap(FLUX.build(), change(0.1), segments=(1, None), per_sample=per_sample)
        conditioning = FLUX.conditioning(0, shape)
        with torch.no_grad():
            found.append(
                [FLUX.output(model(**FLUX.inputs(t, 6, conditioning=conditioning))).clone() for t in (900.0, 700.0, 500.0)]
            )
        assert any("one sample alone raises" in note for note in model.cachekit.stats.notes) == per_sample
    assert equal(*found)


def test_a_batch_that_holds_no_whole_number_of_samples() -> None:
    model = _stack(every(2), 2)
    _three(model)
    assert model.cachekit.stats.notes == {"one decision for a whole batch: its 3 items are not 2 passes of each sample"}
    assert model.cachekit.stats.blocks_run == 4 + 2 + 4


@pytest.mark.parametrize("batch", (1, 2))
def test_a_single_sample_costs_nothing_more(batch: int) -> None:
    """Neither does one whose guidance is in the batch."""
    found = []
    for per_sample in (batch, False):
        model = cachekit.wrap(DIT.build(), change(0.1), segments=(1, None), per_sample=per_sample)
        conditioning = DIT.conditioning(0, Shape(batch))
        with torch.no_grad():
            found.append([DIT.output(model(**DIT.inputs(t, batch, conditioning=conditioning))) for t in (900.0, 800.0, 100.0)])
        found[-1].append(torch.tensor(model.cachekit.stats.blocks_run))
    assert equal(*found)


def test_the_sample_that_changes_most_decides_for_the_batch() -> None:
    """One of four that moves further than the others: the mean passes it over, and diffusers' First-Block Cache takes the mean."""
    conditioning = DIT.conditioning(0, Shape(4))
    first, second = (DIT.inputs(t, 4, conditioning=conditioning) for t in (900.0, 890.0))
    second["hidden_states"][2] = 0.3 * first["hidden_states"][2]
    residuals: list[Tensor] = []
    plain = DIT.build()
    plain.transformer_blocks[0].register_forward_hook(lambda block, args, result: residuals.append(result - args[0]))
    with torch.no_grad():
        plain(**first), plain(**second)
    then, now = residuals
    largest, mean = max(change_of(a, b) for a, b in zip(now, then, strict=True)), change_of(now, then)
    threshold = (largest + mean) / 2
    assert mean < 0.7 * largest
    for policy, recomputes in (
        (change(threshold), True),
        (change(threshold, pooled=True), False),
        (first_block(threshold), False),
    ):
        model = cachekit.wrap(DIT.build(), policy, segments=(1, None), reuse="residual")
        with torch.no_grad():
            model(**first), model(**second)
        assert model.cachekit.stats.records[-1].recomputed == (True, *(recomputes,) * 5)


class _Turns(Policy[int]):
    """The first of three samples at odd steps, the others at even ones: states count samples."""

    def __init__(self) -> None:
        # The first state is the whole batch's.
        self.count = -2

    def init(self) -> int:
        self.count += 1
        return self.count

    def decide(self, state: int, step: Step) -> bool:
        return (step.i % 2 == 1) == (state == 0)


@pytest.mark.parametrize("segments", ((1, 3), "model"))
def test_a_graph_that_changes_is_found_again(segments: Any) -> None:
    """With what has the batch's rows in it, and in the middle of a call for a part of the batch."""
    model = _stack(_Turns(), True, segments, shorter=True)
    found = _three(model)
    stats = model.cachekit.stats
    assert stats.dropped == {"another sequence of blocks": 1} and not stats.notes
    assert [record.shares for record in stats.records][::2] == [(), ()]
    third = pytest.approx(1 / 3)
    assert stats.records[1].shares == ((third,) * 4 if segments == "model" else (1.0, third, third, 1.0))
    assert torch.allclose(found[2], _three(_stack(every(1), False, shorter=True))[2])


@pytest.mark.parametrize("per_sample", (-1, 1.0, "yes", None))
def test_what_per_sample_can_be(per_sample: Any) -> None:
    with pytest.raises(cachekit.ConfigError, match="write True, False, or how many passes"):
        cachekit.wrap(DIT.build(), every(2), per_sample=per_sample)


def test_the_prediction_or_its_blocks() -> None:
    with pytest.raises(cachekit.ConfigError, match="not on both at once"):
        cachekit.wrap(DIT.build(), every(2), segments=["model", (1, 3)], per_sample=True)


@pytest.mark.parametrize(
    "given_",
    ({"policy": "error-budget-0.1"}, {"policy": every(2), "audit_every": 2}, {"policy": "toca-3"}),
    ids=("estimate", "audit", "tokens"),
)
def test_what_is_made_for_a_whole_batch(given_: dict[str, Any]) -> None:
    with pytest.raises(cachekit.ConfigError, match="for a whole batch"):
        cachekit.wrap(DIT.build(), **given_, per_sample=True)
