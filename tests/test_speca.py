"""SpeCa against a plain loop: what is forecast is written over, and the last block is compared with its own forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import naive_forecasts
import pytest
import torch
from cases import Case
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from published import OUTPUTS, Range, forecast, run
from running import generate
from torch import Tensor, nn
from zoo import DIT, FLUX, HUNYUAN_VIDEO, WAN

import cachekit
from cachekit.policies import first, speca
from cachekit.policies.reuses import TaylorSeer
from cachekit.policies.speca import verified

TIMES = tuple(float(t) for t in range(960, 100, -50))
DEPTH = {DIT: 6, WAN: 6, FLUX: 7, HUNYUAN_VIDEO: 7}
METRICS = {
    "elementwise": lambda f, y: ((f - y).abs() / (y.abs() + 1e-10)).mean(),
    "relative": lambda f, y: (f - y).abs().mean() / y.abs().mean(),
    "euclidean": lambda f, y: (f - y).norm() / y.norm(),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Speculation:
    """The rule: after a step whose last block was off by more than max(floor, tau beta^progress), the next is full."""

    def __init__(self, case: Case, model: nn.Module, steps: int, order: int, **options: Any) -> None:
        self.case, self.steps, self.reuse, self.options = case, steps, TaylorSeer(order), options
        self.history: list[tuple[float, Tensor]] = []
        self.full, self.reused, self.error, self.i = True, 0, 0.0, 0
        self.nearest = float("inf")
        model.get_submodule(case.stack[-1]).register_forward_hook(self.leaves)

    def __call__(self, front: Tensor, i: int, t: float) -> bool:
        options = self.options
        allowed = max(options["floor"], options["threshold"] * options["decay"] ** (i / self.steps))
        self.full = i < options["warm_up"] or self.reused == options["limit"] or self.error > allowed
        if i >= options["warm_up"] and self.reused:
            self.nearest = min(self.nearest, abs(self.error / allowed - 1))
        self.full, self.i = self.full or not self.history, i
        self.reused = 0 if self.full else self.reused + 1
        return self.full

    def leaves(self, block: nn.Module, args: Any, result: Any) -> None:
        names = OUTPUTS[self.case.name]
        output = result[names.index("hidden_states")] if isinstance(result, tuple) else result
        if self.full:
            self.error = 0.0
            self.history.insert(0, (float(self.i), output.clone()))
        elif self.reused > self.options["unchecked"]:
            expected = naive_forecasts.taylorseer(self.history, float(self.i), self.reuse)
            self.error = float(METRICS[self.options["metric"]](expected, output))


def compare(case: Case, times: Sequence[float], **options: Any) -> list[bool]:
    """That decisions and samples are the loop's; returns which steps were full.

    Forecasts add up at most ``order`` + 1 values here with weights, there as differences: their absolute sum is at most
    (1 + 2 * 8) * 3 for order 2 after a dense warm-up and eight steps ahead, each of one rounding of 2^-24: 51 * 5 * 2^-24 =
    1.5e-5 of the largest value, passed on by one block and a norm. The error of a check is off by as much and more where an
    element is near 0, so that examples in which a decision hangs on its last thousandth are left out.
    """
    given: dict[str, Any] = {"order": 1, "threshold": 0.3, "decay": 0.05, "floor": 0.01, "warm_up": 3, "limit": 8, "unchecked": 0}
    given = {**given, "metric": "elementwise", **options}
    plain = case.build()
    rule = Speculation(case, plain, len(times), **given)
    held = Range(0, DEPTH[case] - 1, rule, forecast(lambda history, now: naive_forecasts.taylorseer(history, now, rule.reuse)))
    expected = run(case, plain, times, [held])
    if currently_in_test_context():
        assume(rule.nearest > 1e-3)
    assert rule.nearest > 1e-3
    model = cachekit.wrap(case.build(), speca(**options))
    with model.cachekit.session(steps=len(times)), model.cachekit.branch("only"):
        found = generate(model, case, times)
    records = [record.recomputed for record in model.cachekit.stats.records]
    assert all(record[-1] for record in records)
    assert [all(record[:-1]) for record in records] == [any(record[:-1]) for record in records] == held.recomputed
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))
    return held.recomputed


@pytest.mark.parametrize("case", tuple(DEPTH), ids=str)
@pytest.mark.parametrize("threshold", (0.3, 2.0, 20.0))
def test_equal_to_the_loop(case: Case, threshold: float) -> None:
    compare(case, TIMES, threshold=threshold)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric: str) -> None:
    """Each finds some forecasts good enough and others not."""
    full = compare(DIT, TIMES, threshold={"elementwise": 2.0, "relative": 0.3, "euclidean": 0.3}[metric], decay=0.3, metric=metric)
    assert all(full[:3]) and 3 < sum(full) < len(TIMES)


@settings(max_examples=15)
@given(
    st.sampled_from((DIT, FLUX)),
    st.lists(st.integers(20, 990), min_size=4, max_size=14, unique=True),
    st.floats(0.05, 3),
    st.sampled_from((0.05, 0.5, 1.0)),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 3),
    st.sampled_from(tuple(METRICS)),
)
def test_any_options_and_schedule(
    case: Case,
    drawn: list[int],
    threshold: float,
    decay: float,
    order: int,
    warm_up: int,
    limit: int,
    unchecked: int,
    metric: str,
) -> None:
    times = [float(t) for t in sorted(drawn, reverse=True)]
    options = {"order": order, "warm_up": warm_up, "limit": limit, "unchecked": unchecked, "metric": metric}
    compare(case, times, threshold=threshold, decay=decay, **options)


def recomputed(policy: Any, steps: int | None, **options: Any) -> tuple[list[bool], Any]:
    model = cachekit.wrap(DIT.build(), policy, **options)
    if steps is None:
        generate(model, DIT, TIMES)
    else:
        with model.cachekit.session(steps=steps):
            generate(model, DIT, TIMES)
    return [all(record.recomputed) for record in model.cachekit.stats.records], model


def test_bounds_of_the_check() -> None:
    """Nothing passes an allowance of zero: a full step after each reused one. Everything passes one that is large."""
    policy = first(3) | verified(0.0, 1.0, floor=0.0)
    full, _ = recomputed(policy, len(TIMES), segments=(0, -1), reuse="output")
    assert full == [i < 3 or i % 2 == 0 for i in range(len(TIMES))]
    assert sum(recomputed(speca(1e9, decay=1.0, limit=99), len(TIMES))[0]) == 3


def test_progress_goes_by_t_where_the_number_of_steps_is_unknown() -> None:
    """And where the range of t is unknown too, the smallest error is allowed, and stats say so."""
    step = cachekit.Step(5, 400.0, range=1000.0)
    assert verified(0.3, 0.05)._allowed(step) == pytest.approx(0.3 * 0.05**0.6)
    assert verified(0.3, 0.05)._allowed(cachekit.Step(5, 400.0, steps=10)) == pytest.approx(0.3 * 0.05**0.5)
    assert verified(0.3, 0.05)._allowed(cachekit.Step(9, 0.0, steps=10)) == pytest.approx(0.3 * 0.05**0.9)
    assert verified(0.3, 0.001)._allowed(cachekit.Step(9, 0.0, steps=10)) == 0.01
    assert verified(0.3, 0.05)._allowed(cachekit.Step(5, 400.0)) == 0.01
    _, model = recomputed("speca-0.3", None, adapter=cachekit.Adapter())
    assert any("counts from the end was off" in note for note in model.cachekit.stats.notes)


@pytest.mark.parametrize("segments", ("all", (3, None), [(0, 3), (3, 6)], [(0, 3), (3, 5)]), ids=str)
def test_a_block_behind_the_segment_must_run_on_every_step(segments: Any) -> None:
    with pytest.raises(cachekit.ConfigError, match="no block that runs on every step stands there"):
        recomputed("speca-0.3", len(TIMES), segments=segments)


@pytest.mark.parametrize("segments", ((1, 3), "middle", [(0, 2), (3, 5)]), ids=str)
def test_other_segments_with_a_block_behind_them(segments: Any) -> None:
    """The check is of that block, wherever it stands."""
    model = recomputed("speca-9", len(TIMES), segments=segments)[1]
    assert model.cachekit.stats.blocks_run < model.cachekit.stats.blocks_total


def test_modules_with_a_block_behind_them() -> None:
    """And none of its own modules reused."""
    model = recomputed("speca-9", len(TIMES), segments=cachekit.Segment(0, -1, modules="attn"))[1]
    assert model.cachekit.stats.modules_run < model.cachekit.stats.modules_total
    with pytest.raises(cachekit.ConfigError, match="no block that runs on every step stands there"):
        recomputed("speca-9", len(TIMES), segments="attn")
    behind = [cachekit.Segment(0, 3), cachekit.Segment(3, 6, modules="mlp")]
    with pytest.raises(cachekit.ConfigError, match="no block that runs on every step stands there"):
        recomputed("speca-9", len(TIMES), segments=behind)


def test_the_whole_prediction_has_no_block_behind_it() -> None:
    with pytest.raises(cachekit.ConfigError, match="no block that runs on every step stands there"):
        cachekit.wrap(DIT.build(), "speca-0.3", segments="model")


def test_it_holds_what_is_forecast_and_what_the_check_forecasts() -> None:
    """Order + 1 tensors of each."""
    for order in (0, 1, 2):
        model = cachekit.wrap(DIT.build(), speca(1e9, order=order))
        with model.cachekit.session(steps=len(TIMES)):
            generate(model, DIT, TIMES)
            assert model.cachekit.stats.bytes_held == 2 * (order + 1) * (2 * 16 * 32 * 4)
