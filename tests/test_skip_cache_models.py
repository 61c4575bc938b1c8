"""Skip-Cache on every architecture with long skips added, against the same model with its blocks patched by hand.

The patched one is as slow and plain as can be: each block of the middle keeps all that it returned on every full step, and on the
others returns the forecasts of its own; what only the next of them would have seen changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adding import all_cases, shaken
from cases import Case, Shape
from reference import History, exact_weights, remember
from running import generate
from torch import Tensor
from wrapping import stats
from zoo import CASES

import cachekit

TIMES = tuple(float(t) for t in range(940, 0, -90))


class ByHand:
    """Period n inside start > t >= close, counted from the first step; the lower bound takes effect one call late.

    Args:
        model: with long skips, not wrapped.
        middle: paths of the blocks that are reused.
        order: of the polynomial in t through the newest values.
    """

    def __init__(self, model: Any, middle: tuple[str, ...], n: int, start: float, close: float, order: int) -> None:
        self.n, self.start, self.close, self.order = n, start, close, order
        self.i, self.t, self.full = -1, 0.0, True
        self.kept: dict[tuple[str, int], History] = {}
        for path in middle:
            block = model.get_submodule(path)
            block.__dict__["forward"] = functools.partial(self._visit, path, block.forward)

    def step(self, t: float) -> None:
        """A step begins."""
        late = self.i >= 0 and self.t < self.close
        self.i, self.t = self.i + 1, t
        self.full = self.i == 0 or self.i % self.n == 0 or t >= self.start or late

    def _visit(self, path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.full:
            result = original(*args, **kwargs)
            for place, value in enumerate(result if isinstance(result, tuple) else (result,)):
                if isinstance(value, Tensor):
                    remember(self.kept.setdefault((path, place), []), self.t, value.clone())
            return result
        found = {place: self._forecast(history) for (at, place), history in self.kept.items() if at == path}
        return found[0] if len(found) == 1 and 0 in found else tuple(found.get(place) for place in range(max(found) + 1))

    def _forecast(self, history: History) -> Tensor:
        nodes = history[: self.order + 1]
        weights = exact_weights([t for t, _ in nodes], self.t)
        return torch.stack([float(weight) * value for weight, (_, value) in zip(weights, nodes, strict=True)]).sum(0)


@all_cases
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("rule", [(2, 1, 700.0, 50.0), (3, 2, 900.0, 300.0)], ids=str)
def test_equal_to_blocks_that_are_patched_by_hand(case: Case, order: int, rule: tuple[int, int, float, float]) -> None:
    """Bit by bit where the state is held; else to the roundings of a sum in another order (as derived in test_reference.py).

    In float64, but for the stand-ins of original classes, which embed timesteps in float32 as those do.
    """
    n, k, start, close = rule
    dtype, near = (torch.float64, 1e-8) if case in CASES else (torch.float32, 1e-4)
    shape = Shape(dtype=dtype)
    plain, model = (shaken(cachekit.add_long_skips(case.build(), seed=0)).to(dtype) for _ in range(2))
    middle = case.stack[k * case.unit : len(case.stack) - k * case.unit]
    hand = ByHand(plain, middle, n, start, close, order)
    reuse = cachekit.Forecast(order, bound=float("inf"))
    cachekit.wrap(model, f"N{n}-{start:g}-{close:g}", segments=f"skip-{k}", reuse=reuse)
    conditioning = case.conditioning(0, shape)
    with torch.no_grad():
        ours = generate(model, case, TIMES, shape=shape)
        for t, found in zip(TIMES, ours, strict=True):
            hand.step(t)
            theirs = case.output(plain(**case.inputs(t, dtype=dtype, conditioning=conditioning, start=TIMES[0])))
            assert torch.equal(found, theirs) if order == 0 else torch.allclose(found, theirs, rtol=near, atol=near)
    ran = [sum(record.recomputed) for record in stats(model).records]
    assert set(ran) == {len(case.stack), len(case.stack) - len(middle)}
