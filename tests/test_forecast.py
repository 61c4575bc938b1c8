"""Forecasts: exact on polynomials, bounded, and the stored value itself at its own time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import torch
from drawing import At, forecasts, heun, schedules, stack_specs
from hypothesis import given
from hypothesis import strategies as st
from reference import exact_weights, expected_weights
from stack_blocks import StackSpec
from stack_runs import Run, given_time, samples, tensor_of
from stacks import build
from torch import Tensor, nn
from wrapping import handle, stats

import cachekit
from cachekit import Forecast

nodes_of_five = st.sets(st.integers(1, 999), min_size=5, max_size=5).map(lambda drawn: [float(t) for t in sorted(drawn)])


@given(st.integers(0, 4), nodes_of_five, st.integers(0, 999), st.lists(st.integers(-9, 9), min_size=5, max_size=5))
def test_exact_on_polynomials(order: int, nodes: list[float], t: int, coefficients: list[int]) -> None:
    """Of the forecast's own degree, at any spacing of the nodes."""
    weights = Forecast(order=order, bound=1e30).weights(nodes, float(t))
    assert len(weights) <= order + 1

    def value(at: float) -> float:
        return sum(c * (at / 1000) ** k for k, c in enumerate(coefficients[: order + 1]))

    forecast = sum(w * value(node) for w, node in zip(weights, nodes, strict=False))
    # Each of the products and sums rounds by 2^-53 of the terms' size, the weights by a few of these themselves.
    size = 1 + sum(abs(w) * abs(value(node)) for w, node in zip(weights, nodes, strict=False)) + abs(value(t))
    assert abs(forecast - value(t)) <= 100 * 2**-53 * size


@given(st.integers(0, 4), st.floats(1.0, 20.0), nodes_of_five, st.integers(1, 5), st.integers(0, 999))
def test_the_order_falls_until_the_weights_are_bounded(order: int, bound: float, nodes: list[float], length: int, t: int) -> None:
    """And while the history is too short; then the newest value is held."""
    ours = Forecast(order=order, bound=bound).weights(nodes[:length], float(t))
    theirs = expected_weights(order, bound, nodes[:length], float(t))
    assert [w for w in ours if w != 0] == pytest.approx([w for w in theirs if w != 0], rel=1e-12)
    assert sum(map(abs, ours)) <= max(bound, 1.0)


@given(forecasts().filter(lambda reuse: reuse.blend > 0), nodes_of_five, st.integers(1, 5), st.integers(0, 999))
def test_a_blend_lies_between_two_orders(reuse: Forecast, nodes: list[float], length: int, t: int) -> None:
    """Of each of them its share, each lowered for itself; so the bound holds as well, and one value more is kept."""
    ours = reuse.weights(nodes[:length], float(t))
    below, above = (
        replace(reuse, blend=0.0, order=order).weights(nodes[:length], float(t)) for order in (reuse.order, reuse.order + 1)
    )
    expected = [(1 - reuse.blend) * a + reuse.blend * b for a, b in zip_longest(below, above, fillvalue=0.0)]
    # Each of the three products and sums rounds once, to 2^-53 of numbers no larger than the bound allows.
    assert ours == pytest.approx(expected, abs=4 * 2**-53 * reuse.bound)
    assert sum(map(abs, ours)) <= max(reuse.bound, 1.0) * (1 + 1e-12)
    assert reuse.length == reuse.order + 2


@given(forecasts(), nodes_of_five, st.integers(0, 4), st.integers(1, 5))
def test_the_newest_value_at_its_own_time(reuse: Forecast, nodes: list[float], shift: int, length: int) -> None:
    """All weight is on it, so that a repeated t gives the stored value bit for bit."""
    nodes = (nodes[shift:] + nodes[:shift])[:length]
    weights = reuse.weights(nodes, nodes[0])
    assert weights[0] == 1.0 and not any(weights[1:])


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
    """Two such blocks. With a grid the polynomials are in the position of t on it."""

    def __init__(self, degree: int, grid: Sequence[float] | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList([Polynomial(degree), Polynomial(degree)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.grid is not None:
            t = torch.full_like(t, 100.0 * self.grid.index(float(t[0])))
        for block in self.blocks:
            x = block(x, t)
        return x


@given(
    st.integers(0, 3), schedules(min_size=6, max_size=9), st.sampled_from(("all", "model", (1, 2))), st.sampled_from(("t", "grid"))
)
def test_a_polynomial_model_is_forecast_exactly(degree: int, times: tuple[float, ...], where: Any, axis: Any) -> None:
    """Along t on true timesteps, along the grid in their number."""
    torch.manual_seed(degree)
    model = PolynomialModel(degree, times if axis == "grid" else None)
    policy, reuse = At(frozenset(range(degree + 1))), Forecast(order=degree, bound=1e30, axis=axis)
    wrapped = cachekit.wrap(copy.deepcopy(model), policy, segments=where, reuse=reuse)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad(), handle(wrapped).session(timesteps=times):
        for i, t in enumerate(times):
            given = torch.full((2,), t, dtype=torch.float64)
            nodes, at = (times[: degree + 1], t) if axis == "t" else (range(degree + 1), i)
            size = sum(abs(float(w)) for w in exact_weights([float(node) for node in nodes], float(at)))
            assert torch.allclose(wrapped(x, given), model(x, given), rtol=0, atol=1e-13 * size)
            x = x + 0.1 * i
    assert [sum(record.recomputed) for record in stats(wrapped).records[degree + 1 :]] == [0 if where != (1, 2) else 1] * (
        len(times) - degree - 1
    )


@given(stack_specs(), forecasts((0.0,)), st.integers(3, 9), st.integers(1, 90), st.integers(0, 9), st.booleans())
def test_on_an_even_grid_both_axes_agree(spec: StackSpec, reuse: Forecast, steps: int, gap: int, seed: int, twice: bool) -> None:
    """To rounding: there the position on the grid is a linear function of t. Also where a solver evaluates twice at each t."""
    times = tuple(float(t) for t in range(gap * steps, 0, -gap))
    run = Run(heun(times) if twice else times, seed=seed, batch=4, dtype=torch.float64)
    spec = replace(spec, tokens=max(spec.tokens, 4))
    # Sums of absolute weights are fractions of small numbers, so that rounding can't decide which order an odd bound allows.
    reuse = replace(reuse, bound=reuse.bound + math.pi / 1000)
    found = []
    for axis in ("t", "grid"):
        model = cachekit.wrap(build(spec).double(), "every-3 | first-4", segments="all", reuse=replace(reuse, axis=axis))
        xs, y = samples(build(spec).double(), run), torch.zeros(4, dtype=torch.int64)
        y = y if spec.signature == "t" else torch.ones(4, 2, spec.width)
        with torch.no_grad(), handle(model).session(timesteps=run.times), handle(model).branch("only"):
            found.append([tensor_of(model(x, given_time(spec, t, 4), y)) for t, x in zip(run.times, xs, strict=True)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
