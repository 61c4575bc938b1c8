"""Operators of `cachekit.policies.reuses`: exact where they should be, and equal to loops that follow the papers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import reference
import torch
from drawing import At, heun, stack_specs
from hypothesis import assume, given
from hypothesis import strategies as st
from naive_forecasts import foca, naive
from reference import Reference, Site, exact_weights
from stack_blocks import StackSpec
from stack_runs import Run, conditioning, equal, given_time, samples, tensor_of
from stacks import build, visits_of
from torch import Tensor
from wrapping import handle, stats

import cachekit
from cachekit import Forecast, Reuse
from cachekit.history import History
from cachekit.policies.reuses import Bdf, Chebyshev, FlowLogSnr, Hermite, LogSnr, Mix, Scale, TaylorSeer

EPS, HALF = 2.0**-53, math.sqrt(0.5)
ALPHAS = tuple(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist())
SCALE = Scale((900.0, 600.0, 300.0, 100.0), (1.0, 1.1, 0.9, 0.8))

orders = st.integers(0, 3)
axes: st.SearchStrategy[Any] = st.sampled_from(("t", "grid", FlowLogSnr(), LogSnr(ALPHAS)))
seers = st.builds(TaylorSeer, orders, axis=axes)
hermites = st.builds(Hermite, orders, st.sampled_from((0.5, HALF, 1.0)), axis=st.sampled_from(("t", "grid")))
chebyshevs = st.builds(Chebyshev, orders, st.integers(0, 3), axis=axes)
bdfs = st.builds(Bdf, st.integers(0, 2), axis=axes)
lines = st.builds(Forecast, orders, axis=axes, bound=st.sampled_from((5.0, 50.0)))
mixes = st.builds(Mix, st.floats(0, 3), st.floats(0, 3))
operators: st.SearchStrategy[Any] = st.one_of(seers, hermites, chebyshevs, bdfs, lines)
node_lists = st.lists(st.integers(1, 999), min_size=1, max_size=7, unique=True)
falling = st.sets(st.integers(1, 999), min_size=3, max_size=7).map(lambda drawn: [float(t) for t in sorted(drawn)])
uneven_nodes = st.lists(st.integers(40, 160), min_size=7, max_size=7).map(lambda gaps: np.cumsum(gaps, dtype=float).tolist())
coefficients = st.lists(st.integers(-9, 9), min_size=4, max_size=4)


def value(polynomial: Sequence[int], at: float) -> float:
    return sum(c * (at / 1000) ** k for k, c in enumerate(polynomial))


def assert_exact(reuse: Forecast, nodes: Sequence[float], t: float, polynomial: Sequence[int], slack: float = 1.0) -> None:
    """The weighted sum is the polynomial's own value, but for rounding: some hundreds of 2^-53 of the terms' size."""
    weights = reuse.weights(nodes, t)
    terms = [w * value(polynomial, node) for w, node in zip(weights, nodes, strict=False)]
    size = 10 + sum(map(abs, weights)) * max(abs(value(polynomial, node)) for node in nodes) + abs(value(polynomial, t))
    assert abs(sum(terms) - value(polynomial, t)) <= 1000 * EPS * size * slack


def roughness(nodes: Sequence[float], t: float) -> float:
    """How much larger than the weights the terms can be that TaylorSeer's recursion adds up to them: the sum over the orders of
    distance over smallest gap."""
    ratio = abs(t - nodes[0]) / min(abs(a - b) for a, b in pairwise(nodes))
    return sum((2 * ratio) ** j for j in range(4))


# ---- each on its own function class


@given(st.integers(1, 3), falling, st.integers(0, 999), coefficients)
def test_taylorseer_is_exact_on_lines(order: int, nodes: list[float], t: int, line: list[int]) -> None:
    """At any spacing of the nodes."""
    assert_exact(TaylorSeer(order), nodes, float(t), line[:2], slack=roughness(nodes, t))


@given(st.integers(0, 1), falling, st.integers(0, 999))
def test_taylorseer_is_lagrange_to_order_1(order: int, nodes: list[float], t: int) -> None:
    ours, theirs = TaylorSeer(order).weights(nodes, float(t)), Forecast(order, bound=math.inf).weights(nodes, float(t))
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * max(map(abs, theirs)))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-300, 300))
def test_taylorseer_is_not_lagrange_at_order_2(h0: int, h1: int, x: int) -> None:
    """But at x = 2 h0^2 / (h1 - h0), and at the newest node: so nowhere ahead on even nodes."""
    nodes, t = [700, 700 + h0, 700 + h0 + h1], 700 + x
    seer = [Fraction(w).limit_denominator(10**9) for w in TaylorSeer(2).weights([float(n) for n in nodes], float(t))]
    newton = exact_weights([float(n) for n in nodes], float(t))
    close = all(abs(float(a - b)) <= 1e-6 for a, b in zip(seer, newton, strict=False))
    if x == 0:
        assert seer == [1]
    elif x * (h0 - h1) == 2 * h0**2:
        assert close  # x is signed here, nodes rise behind the newest: x = -2 h0^2 / (h1 - h0)
    else:
        gap = Fraction(x * x, 2 * h0 * h0) - Fraction(x * (x - h0), h0 * (h0 + h1))
        assume(abs(gap) > 1e-4)
        assert not close
        # The second differences' share of the two: x^2 / 2 against x (x + h) / 2 ahead, on even nodes.
        if h0 == h1:
            assert float(seer[2] - newton[2]) == pytest.approx(float(Fraction(x, 2 * h0)), abs=1e-6)


@given(st.integers(1, 3), falling, st.integers(0, 999), coefficients)
def test_hermite_is_exact_on_lines_at_one_scale(order: int, nodes: list[float], t: int, line: list[int]) -> None:
    assume(order == 1 or t not in nodes)
    assert_exact(Hermite(order, HALF), nodes, float(t), line[:2], slack=roughness(nodes, t))


@given(st.floats(0.1, 1.0), falling, st.integers(0, 999))
def test_hermite_of_order_1_passes_on_a_share(scale: float, nodes: list[float], t: int) -> None:
    """2 s^2 of TaylorSeer's change, the rest held."""
    share, seer = 2 * scale**2, TaylorSeer(1).weights(nodes, float(t))
    expected = [1 - share + share * seer[0], *(share * w for w in seer[1:])]
    assert np.allclose(Hermite(1, scale).weights(nodes, float(t)), expected, rtol=1e-12, atol=1e-12 * max(map(abs, seer)))


@given(orders, st.integers(0, 3), falling, st.integers(0, 999), coefficients)
def test_chebyshev_is_exact_on_polynomials(order: int, extra: int, nodes: list[float], t: int, polynomial: list[int]) -> None:
    """Of its degree, or of the degree that a short history allows."""
    degree = min(order, len(nodes) - 1)
    reuse, x = Chebyshev(order, extra), abs(t - nodes[0]) / (abs(nodes[0] - nodes[1]))
    # Far from a narrow history the basis' own values are large, and so is their rounding.
    assert_exact(reuse, nodes, float(t), polynomial[: degree + 1], slack=(1 + 4 * x) ** degree)


@given(st.integers(1, 3), st.integers(0, 3), uneven_nodes, st.lists(st.integers(-9, 9), min_size=7, max_size=7))
def test_chebyshev_is_the_best_fit(order: int, extra: int, nodes: list[float], values: list[int]) -> None:
    """As numpy fits it in powers, to the newest order + 1 + extra values."""
    history = [(node, torch.tensor([v], dtype=torch.float64)) for node, v in zip(nodes, values, strict=True)]
    theirs, weights = naive(history, 0.0, Chebyshev(order, extra)), Chebyshev(order, extra).weights(nodes, 0.0)
    ours = sum(w * v for w, v in zip(weights, values, strict=False))
    assert len(weights) == min(order + 1 + extra, 7)
    assert ours == pytest.approx(float(theirs), rel=1e-9, abs=1e-9 * (1 + sum(map(abs, weights))))


@given(st.integers(1, 3), st.integers(1, 3), falling, st.integers(0, 999))
def test_chebyshev_has_the_shortest_weights(order: int, extra: int, nodes: list[float], t: int) -> None:
    """Of all that are exact: Lagrange's among them, which it is where nothing is left over."""
    assume(t != nodes[0])
    order = min(order, len(nodes) - 1)
    lagrange = [float(w) for w in exact_weights(nodes[: order + 1], float(t))]
    tight = Chebyshev(order, 0).weights(nodes, float(t))
    assert np.allclose(tight, lagrange, rtol=1e-6, atol=1e-6 * max(map(abs, lagrange)))
    assert np.linalg.norm(Chebyshev(order, extra).weights(nodes, float(t))) <= np.linalg.norm(lagrange) * (1 + 1e-6)


@given(st.integers(1, 2), falling, st.integers(0, 999), coefficients)
def test_bdf_is_exact_on_lines(order: int, nodes: list[float], t: int, line: list[int]) -> None:
    assert_exact(Bdf(order), nodes, float(t), line[:2], slack=roughness(nodes, t))


@given(st.integers(1, 300), st.integers(-300, 300), st.lists(st.integers(-9, 9), min_size=3, max_size=3))
def test_bdf_is_foca_on_even_nodes(gap: int, h: int, values: list[int]) -> None:
    """The paper's predictor and corrector, one after the other; at order 1 one gap ahead it is 2 F0 - F1."""
    assume(h != 0)
    nodes = [500.0 + gap * k for k in range(3)]
    ours = sum(w * v for w, v in zip(Bdf(2).weights(nodes, 500.0 + h), values, strict=True))
    f0, f1, f2 = map(float, values)
    assert ours == pytest.approx(foca(f0, f1, f2, -gap, h), rel=1e-9, abs=1e-9 * (1 + abs(h) / gap))
    assert Bdf(1).weights(nodes, 500.0 - gap) == pytest.approx([2.0, -1.0])


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200))
def test_bdf_errs_less_than_the_line_on_parabolas(h: int, h0: int, h1: int) -> None:
    """By h^2 against h (h + h0), for t^2."""
    nodes = [0.0, float(h0), float(h0 + h1)]
    errors = [sum(w * n * n for w, n in zip(Bdf(k).weights(nodes, -float(h)), nodes, strict=False)) - h * h for k in (1, 2)]
    assert errors == pytest.approx([-h * (h + h0), -h * h], rel=1e-9)


@given(st.sampled_from((900, 600, 300, 100)), st.sampled_from((900, 600, 300, 100)))
def test_scale_is_the_product_of_the_ratios(then: int, now: int) -> None:
    """Values that change their length so are forecast exactly."""
    lengths = {900: 2.0, 600: 2.0 * 1.1, 300: 2.0 * 1.1 * 0.9, 100: 2.0 * 1.1 * 0.9 * 0.8}
    assert lengths[then] * SCALE.weights([float(then)], float(now))[0] == pytest.approx(lengths[now], rel=1e-14)


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 1000))
def test_scales_add_up(a: float, b: float, c: float) -> None:
    """Over any times, also between and beyond the calibrated ones."""
    there, on, all_at_once = (SCALE.weights([x], y)[0] for x, y in ((a, b), (b, c), (a, c)))
    assert there * on == pytest.approx(all_at_once, rel=1e-13)
    assert SCALE.weights([a], a) == [1.0]
    assert SCALE.weights([950.0], 999.0) == SCALE.weights([50.0], 20.0) == [1.0]
    assert SCALE.weights([900.0], 750.0)[0] == pytest.approx(math.sqrt(1.1))


# ---- log-SNR


@given(orders, st.integers(4, 9), st.integers(-3, 3), st.integers(1, 4))
def test_on_a_grid_even_in_the_log_snr_both_axes_agree(order: int, steps: int, start: int, ahead: int) -> None:
    """There the position on the grid is an affine function of it."""
    lambdas = [start + k / 2 for k in range(steps + ahead)]
    times = [1000 / (1 + math.exp(x)) for x in lambdas]
    assume(min(times) > 1 and max(times) < 999)
    axis = FlowLogSnr()
    assert [axis(t) for t in times] == pytest.approx(lambdas, abs=1e-12)
    ours = Forecast(order, bound=math.inf).weights([axis(t) for t in times[:steps][::-1]], axis(times[-1]))
    grid = Forecast(order, bound=math.inf).weights([float(k) for k in range(steps)][::-1], float(len(times) - 1))
    assert ours == pytest.approx(grid, rel=1e-9, abs=1e-9 * sum(map(abs, grid)))


@pytest.mark.parametrize("axis", [FlowLogSnr(), LogSnr(ALPHAS)], ids=["flow", "variance preserving"])
def test_the_log_snr_falls_with_t_and_is_finite_at_both_ends(axis: Any) -> None:
    found = [axis(t) for t in np.arange(0.0, 1000.5, 0.5)]
    assert all(map(math.isfinite, found))
    assert all(a >= b for a, b in pairwise(found))
    assert all(axis(float(t)) > axis(t + 1.0) for t in range(1, 998))


def test_the_log_snr_is_that_of_the_schedule() -> None:
    for t in (0, 10, 500, 999):
        assert LogSnr(ALPHAS)(t) == pytest.approx(math.log(math.sqrt(ALPHAS[t]) / math.sqrt(1 - ALPHAS[t])))
    assert LogSnr(ALPHAS)(10.25) == pytest.approx(0.75 * LogSnr(ALPHAS)(10) + 0.25 * LogSnr(ALPHAS)(11))
    assert LogSnr((0.5, 0.0))(1) == pytest.approx(0.5 * math.log(1e-8))


# ---- all of them


@given(operators, node_lists, st.integers(0, 999))
def test_a_constant_is_forecast_as_itself(reuse: Any, nodes: list[int], t: int) -> None:
    """The weights add up to one."""
    times = sorted(float(node) for node in nodes)
    weights = reuse.weights(times, float(t))
    slack = roughness(times, t) if len(times) > 1 else 1.0
    assert abs(sum(weights) - 1) <= 1000 * EPS * (1 + sum(map(abs, weights)) + slack)
    assert len(weights) <= min(reuse.length, len(nodes))


@given(mixes, st.lists(st.floats(-1000, 1), min_size=1, max_size=3, unique=True), st.floats(-1000, 2))
def test_a_mix_of_constants_is_the_constant(mix: Mix, times: list[float], t: float) -> None:
    """Over shares of a generation, and over what stands for one of unknown length. At its own time a mix is not the newest value,
    so that it is none of ``operators``: its share of the last change depends on how far the generation is alone."""
    weights = mix.weights(times, t)
    assert abs(sum(weights) - 1) <= 4 * EPS * sum(map(abs, weights))
    assert len(weights) == (1 if t < 0 else min(mix.length, len(times)))


@given(operators | st.just(SCALE), node_lists)
def test_the_newest_value_at_its_own_time(reuse: Reuse, nodes: list[int]) -> None:
    """Bit for bit, also where the formula would say otherwise (Hermite) or fit only nearly (Chebyshev)."""
    times = [float(node) for node in nodes]
    assert reuse.weights(times, times[0]) == [1.0]


@given(operators, st.floats(1.0, 20.0), node_lists, st.integers(0, 999))
def test_a_bound_lowers_the_order(reuse: Forecast, bound: float, nodes: list[int], t: int) -> None:
    times = [float(node) for node in nodes]
    bounded = replace(reuse, bound=bound).weights(times, float(t))
    assert sum(map(abs, bounded)) <= bound
    for order in range(reuse.order, 0, -1):
        lower = replace(reuse, order=order, bound=math.inf).weights(times, float(t))
        if sum(map(abs, lower)) <= bound:
            assert bounded == lower
            break
    else:
        assert bounded == [1.0]


@pytest.mark.parametrize("make", [TaylorSeer, Hermite, Chebyshev, Bdf])
@given(run=st.builds(Run, st.just((900.0, 700.0, 600.0, 400.0, 300.0, 50.0)), st.integers(0, 9), st.just(4)), spec=stack_specs())
def test_order_0_holds_bit_by_bit(make: Any, run: Run, spec: StackSpec) -> None:
    spec = replace(spec, tokens=max(spec.tokens, 4))
    outputs = []
    for reuse in (make(0), "output"):
        model = cachekit.wrap(build(spec), "every-2", segments="all", reuse=reuse)
        with handle(model).session(timesteps=run.times):
            outputs.append(run.outputs(model))
        assert make(0).length == 1
    assert equal(*outputs)


@st.composite
def uneven(draw: Any) -> tuple[float, ...]:
    """Eight to ten timesteps with gaps of 40 to 160, as whole numbers: weights stay of a size that leaves digits to compare."""
    return tuple(float(950 - 100 * k + draw(st.integers(-30, 30))) for k in range(draw(st.integers(7, 9))))


def loop_and_model(
    spec: StackSpec, reuse: Forecast, run: Run, where: Any, indices: frozenset[int]
) -> tuple[list[Tensor], list[Tensor], Any]:
    """Predictions on the same samples of the naive loop and of the wrapped model, and the model."""
    plain, policy = build(spec).double(), At(indices)
    visits = range(len(visits_of(plain)))[slice(*where)] if isinstance(where, tuple) else range(len(visits_of(plain)))
    loop = Reference(plain, [Site(() if where == "model" else visits, policy, reuse)] if visits else [], len(run.times))
    model = cachekit.wrap(build(spec).double(), policy, segments=where, reuse=reuse)
    xs, y = samples(build(spec).double(), run), conditioning(spec, run.batch, run.seed)
    ours, theirs = [], []
    with torch.no_grad(), handle(model).session(timesteps=run.times), patch.object(reference, "forecast", naive):
        for t, x in zip(run.times, xs, strict=True):
            arguments = x, given_time(spec, t, run.batch), y
            theirs.append(loop(t, *arguments))
            ours.append(tensor_of(model(*arguments)))
    return theirs, ours, model


# Three to six full steps at the start, so that there is a history worth forecasting from, and any others.
full_steps = st.builds(lambda first, more: frozenset(range(first)) | more, st.integers(3, 6), st.frozensets(st.integers(0, 8)))


@pytest.mark.parametrize("reuses", [seers, hermites, chebyshevs, bdfs, lines])
@given(data=st.data(), spec=stack_specs(), times=uneven(), indices=full_steps, twice=st.booleans(), seed=st.integers(0, 9))
def test_equal_to_the_papers_loops(
    reuses: Any, data: st.DataObject, spec: StackSpec, times: Any, indices: Any, twice: bool, seed: int
) -> None:
    """Step by step, on any stack, with input correction too, and with solvers that evaluate twice at each t."""
    spec = replace(spec, tokens=max(spec.tokens, 4))
    reuse = replace(data.draw(reuses), beta=data.draw(st.sampled_from((0.0, 0.5, 1.0))))
    where = data.draw(st.sampled_from(("all", "model", (1, None), *([(0, 2)] * (len(visits_of(build(spec))) >= 2)))))
    run = Run(heun(times) if twice else times, seed=seed, batch=4, dtype=torch.float64)
    theirs, ours, _ = loop_and_model(spec, reuse, run, where, indices)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8 * (1 + float(b.abs().max())))


@given(operators, uneven())
def test_the_length_says_what_is_held(reuse: Forecast, times: tuple[float, ...]) -> None:
    """Tensors for each that is stored, once as many full steps are over."""
    spec = StackSpec(depth=3, order=(0, 1, 2), glue=("",) * 8, tokens=4)
    run = Run(times, batch=4, dtype=torch.float64)
    _, ours, model = loop_and_model(spec, reuse, run, "model", frozenset(range(9)))
    assert stats(model).bytes_peak >= ours[0].nbytes * min(reuse.length, len(times))
    history = History()
    for t in times:
        history.push(t, torch.zeros(1), reuse.length)
    assert len(history.entries) == min(reuse.length, len(times))


@given(uneven(), st.integers(0, 9))
def test_scale_on_a_model(times: tuple[float, ...], seed: int) -> None:
    """The newest residual times the ratios of the steps since then, multiplied one by one."""
    spec = StackSpec(depth=3, order=(0, 1, 2), glue=("",) * 8, tokens=4)
    ratios = tuple(1 + 0.1 * math.sin(k + seed) for k in range(len(times)))
    run = Run(times, seed=seed, batch=4, dtype=torch.float64)
    model, plain = build(spec).double(), build(spec).double()
    cachekit.wrap(model, "every-3", segments="model", reuse=Scale(times, ratios))
    xs, y = samples(plain, run), conditioning(spec, 4, seed)
    residual = torch.zeros_like(xs[0])
    with torch.no_grad(), handle(model).session(timesteps=times):
        for i, (t, x) in enumerate(zip(times, xs, strict=True)):
            found = tensor_of(model(x, given_time(spec, t, 4), y))
            residual = residual * ratios[i] if i % 3 else tensor_of(plain(x, given_time(spec, t, 4), y)) - x
            assert torch.allclose(found, x + residual, rtol=1e-12, atol=1e-12)


@given(operators | mixes | st.just(SCALE))
def test_copies_and_pickles_are_equal(reuse: Reuse) -> None:
    assert copy.deepcopy(reuse) == reuse == pickle.loads(pickle.dumps(reuse))
    assert hash(copy.deepcopy(reuse)) == hash(reuse)
    assert isinstance(reuse, Reuse)
