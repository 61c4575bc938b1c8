"""Skip-Cache on every architecture with long skips added, against the same model with its blocks patched by hand.

The patched one is as slow and plain as can be: each block of the middle keeps all that it returned on every full step, and on the
others returns the forecasts of its own; what only the next of them would have seen changes nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adding import all_cases, shaken
from cases import Case, Shape
from reference import History, exact_weights, remember
from running import generate
from torch import Tensor
from wrapping import handle, stats
from zoo import CASES

import cachekit

TIMES = tuple(float(t) for t in range(940, 0, -90))


def in_window(n: int, start: float, close: float) -> list[bool]:
    """Which steps are full: every n-th, those outside start > t >= close; the lower bound takes effect one call late."""
    late = [False, *(t < close for t in TIMES)]
    return [i == 0 or i % n == 0 or t >= start or after for i, (t, after) in enumerate(zip(TIMES, late, strict=False))]


class ByHand:
    """Blocks that keep what they returned on full steps, and forecast it on the others.

    Args:
        model: with long skips, not wrapped.
        middle: paths of the blocks that are reused.
        full: for each step.
        nodes: the polynomial's variable at each step.
        order: of the polynomial through the newest values, lowered while the sum of its absolute weights passes ``bound``.
    """

    def __init__(
        self, model: Any, middle: tuple[str, ...], full: list[bool], nodes: list[float], order: int, bound: float = math.inf
    ) -> None:
        self.steps, self.nodes, self.order, self.bound = full, nodes, order, bound
        self.i, self.now, self.full = -1, 0.0, True
        self.kept: dict[tuple[str, int], History] = {}
        for path in middle:
            block = model.get_submodule(path)
            block.__dict__["forward"] = functools.partial(self._visit, path, block.forward)

    def step(self) -> None:
        """A step begins."""
        self.i += 1
        self.now, self.full = self.nodes[self.i], self.steps[self.i]

    def _visit(self, path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.full:
            result = original(*args, **kwargs)
            for place, value in enumerate(result if isinstance(result, tuple) else (result,)):
                if isinstance(value, Tensor):
                    remember(self.kept.setdefault((path, place), []), self.now, value.clone())
            return result
        found = {place: self._forecast(history) for (at, place), history in self.kept.items() if at == path}
        return found[0] if len(found) == 1 and 0 in found else tuple(found.get(place) for place in range(max(found) + 1))

    def _forecast(self, history: History) -> Tensor:
        for order in range(min(self.order, len(history) - 1), -1, -1):
            newest = history[: order + 1]
            weights = exact_weights([node for node, _ in newest], self.now)
            if order == 0 or sum(map(abs, weights)) <= self.bound:
                break
        return torch.stack([float(weight) * value for weight, (_, value) in zip(weights, newest, strict=True)]).sum(0)


def compare(case: Case, policy: str, k: int, reuse: Any, full: list[bool], nodes: list[float], order: int, bound: float) -> None:
    """Bit by bit where the state is held; else to the roundings of a sum in another order (as derived in test_reference.py).

    In float64, but for the stand-ins of original classes, which embed timesteps in float32 as those do.
    """
    dtype, near = (torch.float64, 1e-8) if case in CASES else (torch.float32, 1e-4)
    shape = Shape(dtype=dtype)
    plain, model = (shaken(cachekit.add_long_skips(case.build(), seed=0)).to(dtype) for _ in range(2))
    k = min(k, (len(case.stack) // case.unit - 1) // 2)
    middle = case.stack[k * case.unit : len(case.stack) - k * case.unit]
    hand = ByHand(plain, middle, full, nodes, order, bound)
    cachekit.wrap(model, policy, segments=f"skip-{k}", reuse=reuse)
    conditioning = case.conditioning(0, shape)
    with torch.no_grad(), handle(model).session(steps=len(TIMES)):
        ours = generate(model, case, TIMES, shape=shape)
        for t, found in zip(TIMES, ours, strict=True):
            hand.step()
            theirs = case.output(plain(**case.inputs(t, dtype=dtype, conditioning=conditioning, start=TIMES[0])))
            assert torch.equal(found, theirs) if order == 0 else torch.allclose(found, theirs, rtol=near, atol=near)
        ran = [sum(record.recomputed) for record in stats(model).records]
    assert ran == [len(case.stack) if each else len(case.stack) - len(middle) for each in full]
    assert len(set(ran)) == 2


@all_cases
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rule", [(2, 1, 700.0, 50.0), (3, 2, 900.0, 300.0)], ids=str)
def test_a_window_held_and_forecast_in_true_timesteps(case: Case, order: int, rule: tuple[int, int, float, float]) -> None:
    n, k, start, close = rule
    reuse = cachekit.Forecast(order, bound=math.inf)
    compare(case, f"N{n}-{start:g}-{close:g}", k, reuse, in_window(n, start, close), list(TIMES), order, math.inf)


@all_cases
@pytest.mark.parametrize("n", [2, 3])
def test_skip_every_n(case: Case, n: int) -> None:
    """Full where its plan says so (test_plan.py); to order 2 along the sampler's grid, the sum of weights bounded by 5."""
    full = list(cachekit.plan(f"skip-every-{n}", TIMES))
    nodes = [float(i) for i in range(len(TIMES))]
    compare(case, f"skip-every-{n}", 1, None, full, nodes, 2, 5.0)
