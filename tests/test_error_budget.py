"""The error budget: a plain loop of its own decides and predicts the same; what is spent stays within what was given."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import Case, Shape
from hypothesis import given
from hypothesis import strategies as st
from naive_budget import Budget, predictions
from running import generate
from torch import Tensor
from wrapping import handle, stats
from zoo import DIT, HUNYUAN_DIT

import cachekit
from cachekit import Amplification, ConfigError, Forecast, Step
from cachekit.decisions import Decisions
from cachekit.demo import fashion
from cachekit.demo.measure import relative_error
from cachekit.estimates import Error, ratio
from cachekit.policies import ErrorBudget
from cachekit.policies.error_budget import SHIPPED
from cachekit.policies.reuses import Hermite

# Uneven, and fine enough that a forecast has something to gain.
TIMES = tuple(float(round(1000 - 37 * k - k * k / 4)) for k in range(20))
DOUBLE = Shape(2, torch.float64)
A = Amplification((900.0, 500.0), (3.0, 1.0))
REUSES = (Forecast(), Forecast(2, axis="grid"), Forecast(1), Forecast(2, bound=1e9), Hermite(2), Forecast(1, beta=1.0))


@pytest.mark.parametrize("case", (DIT, HUNYUAN_DIT), ids=str)
@pytest.mark.parametrize(
    "segments, reuse",
    # These models predict twice the sample's channels, so that the whole prediction has no residual.
    [*(("skip-1", reuse) for reuse in REUSES), *(("model", reuse) for reuse in REUSES if not reuse.beta)],
    ids=str,
)
def test_a_plain_loop_decides_and_predicts_the_same(case: Case, segments: str, reuse: Forecast) -> None:
    """On a DiT, and on a model with long skip connections, where Skip-Cache's segments with a Hermite forecast are among them."""
    eps = 0.15
    model = cachekit.wrap(case.build().double(), ErrorBudget(eps, amplification=A), segments=segments, reuse=reuse)
    plain = Budget(eps, 1.25, A, reuse, len(TIMES))
    with torch.no_grad(), handle(model).session(steps=len(TIMES)):
        ours = generate(model, case, TIMES, shape=DOUBLE)
    with torch.no_grad():
        theirs = predictions(case.build().double(), case, TIMES, plain, segments == "model", DOUBLE)
    assert [all(record.recomputed) for record in stats(model).records] == plain.full
    assert 3 <= plain.full.count(False) <= len(TIMES) - 4
    for a, b in zip(ours, theirs, strict=True):
        # A forecast's weights are sums and quotients of times up to 1000, rounded at 2e-16 of at most a few hundred terms each.
        assert torch.allclose(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


errors = st.floats(0.0, 10.0) | st.sampled_from((float("nan"), float("inf")))


@given(st.floats(0.001, 1.0), st.lists(st.tuples(errors, st.floats(0.1, 90.0)), min_size=2, max_size=12), st.booleans())
def test_the_bound_never_passes_what_was_given_out(eps: float, drawn: list[tuple[float, float]], known: bool) -> None:
    """Whatever the estimates are: reuse is what fits, all of it, and a cost that is no number recomputes."""
    policy = ErrorBudget(eps, amplification=2.0, margin=1.0)
    state, spent, t = policy.init(), 0.0, 1000.0
    for i, (error, gap) in enumerate(drawn):
        before, t = (t, max(t - gap, 0.0)) if i else (None, t)
        step = Step(i, t, len(drawn) if known else None, 1000.0, before, estimated=partial(float, error))
        given_out = eps * ((i + 1) / len(drawn) if known else 1 - t / 1000)
        cost = 2.0 * ((before - t) / 1000 if before is not None else 0.0) * error
        recompute = policy.decide(state, step)
        assert recompute == (not spent + cost <= given_out)
        spent += 0.0 if recompute else cost
        state = policy.update(state, step, recompute)
        assert state.bound == pytest.approx(spent) and spent <= eps


def test_a_second_evaluation_at_one_timestep_costs_as_much_as_the_first() -> None:
    policy = ErrorBudget(1.0, amplification=1.0, margin=1.0)
    state = policy.init()
    for i, (t, before) in enumerate([(900.0, None), (800.0, 900.0), (800.0, 800.0)]):
        state = policy.update(state, Step(i, t, 3, 1000.0, before, estimated=lambda: 0.5), i == 0)
    assert state.bound == pytest.approx(2 * 0.1 * 0.5)


def test_what_another_policy_recomputes_costs_nothing() -> None:
    """The combined decision counts; and the site's estimate is not asked for then."""

    def refuse() -> float:
        raise AssertionError

    policy = ErrorBudget(1.0)
    assert policy.update(policy.init(), Step(1, 900.0, 10, 1000.0, 950.0, estimated=refuse), True).bound == 0.0


def test_without_steps_and_range_every_step_is_full() -> None:
    model = cachekit.wrap(DIT.build(), "error-budget-0.5", adapter=cachekit.Adapter(timestep="timestep"))
    assert handle(model).adapter.range is None
    with torch.no_grad():
        generate(model, DIT, TIMES[:6])
    assert all(all(record.recomputed) for record in stats(model).records)
    assert any("counts from the end" in note for note in stats(model).notes)


class Line(torch.nn.Module):
    """Predicts a line in t, and counts how often."""

    calls = 0

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        self.calls += 1
        return torch.ones_like(x) * (timestep + 2.0)


def test_a_value_that_is_forecast_exactly_is_always_reused() -> None:
    """A line by a parabola, once three values are there: that the order below is as good shows that nothing is missed."""
    model = cachekit.wrap(Line().double(), ErrorBudget(1e-6), segments="model", reuse=Forecast(2, axis="t", bound=1e9))
    with torch.no_grad(), handle(model).session(steps=len(TIMES)):
        for k, t in enumerate(TIMES):
            predicted = model(torch.ones(1, 4, dtype=torch.float64) + k / 100, t)
            # Weights of up to 20 gaps squared, times values of up to 1000, at 2e-16 each.
            assert torch.allclose(predicted, torch.full_like(predicted, t + 2.0), rtol=0, atol=1e-9)
    assert model.calls == 3


@pytest.mark.parametrize("solver, steps", ((fashion.ddim, 50), (fashion.dpm_solver, 30)))
def test_runs_of_the_shipped_model_stay_under_the_budget(solver: Any, steps: int) -> None:
    """With what was measured on another seed, and at least a third of the steps reused."""
    model = fashion.load_model()

    def sample(seed: int) -> Tensor:
        return fashion.sample(model, solver(), seed, steps, 1)

    measured = cachekit.measure_amplification(model, partial(sample, 0), segments="model", points=3)
    for seed in (3000, 3001):
        cachekit.unwrap(model)
        full = sample(seed)
        cachekit.wrap(model, ErrorBudget(0.05, amplification=measured), segments="model", reuse="grid-taylor-2")
        assert relative_error(sample(seed), full) <= 0.05
        assert sum(not all(record.recomputed) for record in stats(model).records) >= steps / 3


@pytest.mark.slow
def test_nineteen_of_twenty_runs_stay_under_the_budget() -> None:
    """The share that docs/error-budget.md gives is 718 of 720, with two rows of its table: of the whole prediction the one whose
    bound is nearly met, of the middle blocks the one of the smaller margin.

    6 seeds, 2 budgets and 2 rows are 24 runs: with fewer than 20 a single run over its budget would be more than one in twenty,
    and of held values 2 of 60 are over with this solver. A policy that kept its budget in 80 % of its
    runs only would pass at one choice of seeds in thirty: 0.8^24 + 24 * 0.2 * 0.8^23 = 0.033.
    """
    model, under = fashion.load_model(), []
    sample = partial(fashion.sample, model, fashion.dpm_solver(), steps=30, images=1)
    full = {seed: sample(seed) for seed in range(3000, 3006)}
    for segments, reuse, margin in (("model", "output", 1.25), ("middle", "grid-taylor-2", 0.7)):
        cachekit.unwrap(model)
        measured = cachekit.measure_amplification(model, partial(sample, 0), segments=segments, points=4)
        for eps in (0.01, 0.05):
            cachekit.wrap(model, ErrorBudget(eps, amplification=measured, margin=margin), segments=segments, reuse=reuse)
            found = {seed: relative_error(sample(seed), true) for seed, true in full.items()}
            under += [error <= eps for error in found.values()]
            # Else it would be kept by spending nothing.
            assert min(found.values()) > eps / 20
    assert len(under) == 24 and sum(under) >= 0.95 * len(under)


def test_the_preset_and_its_string_are_the_same() -> None:
    preset = cachekit.policies.error_budget(0.02)
    assert preset.policy == ErrorBudget(0.02) and preset.policy.amplification == SHIPPED
    assert cachekit.spec.parse_policy("error-budget-0.02") == preset
    assert preset.reuse == Forecast(2, axis="grid")


@pytest.mark.parametrize("spec", ("error-budget", "error-budget-0", "error-budget-0.1-0"))
def test_numbers_that_make_no_sense_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="error-budget"):
        cachekit.wrap(DIT.build(), spec)


def test_a_plan_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="without a model"):
        cachekit.plan("error-budget-0.02", TIMES)


def test_errors_of_nothing() -> None:
    """0 / 0 is no error, and something against nothing is infinite."""
    assert ratio(0.0, 0.0) == 0.0 and ratio(1.0, 0.0) == float("inf") and ratio(1.0, 2.0) == 0.5
    assert Error().value == 0.0


def test_device_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if on a device for which reading waits: one for the order below a step, one more where a forecast was newly missed."""
    monkeypatch.setattr(Decisions, "_count", lambda self, number: setattr(self, "waits", self.waits + 1))
    for reuse, each in ((Forecast(), 0), (Forecast(2, axis="grid"), 1)):
        model = cachekit.wrap(DIT.build(), ErrorBudget(0.15, amplification=A), reuse=reuse)
        with torch.no_grad(), handle(model).session(steps=len(TIMES)):
            generate(model, DIT, TIMES)
        full = [all(record.recomputed) for record in stats(model).records]
        # Nothing was missed before step 1, and nothing is asked of what the last step missed.
        assert stats(model).synchronisations == each * (len(TIMES) - 2) + sum(full[1:-1])
