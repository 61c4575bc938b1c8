"""A call that shows another graph is begun again, and its caller never knows: not even where the model uses its arguments up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wrapping import handle, stats

import cachekit
from cachekit import ModelError
from cachekit.policies import every

TIMES = (900.0, 700.0, 500.0, 300.0, 200.0)


class UsesUp(nn.Module):
    """Four blocks, in another order from t = 400 on; ``use`` is what it does to its arguments before and at each block."""

    def __init__(self, use: Callable[[Tensor, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.use = use
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x: Tensor, t: float, **given: Any) -> Tensor:
        """x: (B, 8)."""
        h = x
        for k in (0, 2, 1, 3) if t < 400 else (0, 1, 2, 3):
            h = self.blocks[k](h) + self.use(x, given)
        return h


def _pop(x: Tensor, given: dict[str, Any]) -> Any:
    return given["extras"].pop()


def _pop_nested(x: Tensor, given: dict[str, Any]) -> Any:
    return given["nested"]["extras"].pop() + len(given["nested"])


def _sample(x: Tensor, given: dict[str, Any]) -> Any:
    return x.mul_(1.25).sum()


def _context(x: Tensor, given: dict[str, Any]) -> Any:
    return given["context"].add_(1).sum()


def arguments(seed: int) -> dict[str, Any]:
    """Of one call."""
    extras = list(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
    return {"extras": extras, "nested": {"extras": list(extras)}, "context": torch.ones(2, 3)}


@pytest.mark.parametrize("use", [_pop, _pop_nested, _sample, _context])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_what_a_model_does_to_its_arguments_is_done_once(use: Any, inference: bool, named: bool) -> None:
    """Full at every step, it equals the bare model bit for bit, and leaves the same behind in its arguments."""
    torch.manual_seed(0)
    bare = UsesUp(use).eval()
    model, x = cachekit.wrap(copy.deepcopy(bare), every(1)), torch.randn(2, 8)
    with torch.inference_mode(inference), torch.no_grad():
        for k, t in enumerate(TIMES):
            # Of a named branch the conditioning may change from step to step.
            xs, given = (x.clone(), x.clone()), (arguments(k), arguments(k))
            for every_second in given:
                every_second["context"] += k if named else 0
            expected = bare(xs[0], t, **given[0])
            if named:
                with handle(model).branch("cond"):
                    found = model(xs[1], t, **given[1])
            else:
                found = model(xs[1], t, **given[1])
            assert torch.equal(expected, found)
            assert torch.equal(xs[0], xs[1]) and torch.equal(given[0]["context"], given[1]["context"])
            assert len(given[0]["extras"]) == len(given[1]["extras"])
            x = x + 0.01
    # Where the conditioning of an unnamed branch is new at every step, each call is a first one.
    assert stats(model).dropped["another sequence of blocks"] == (1 if named else 0)


@torch.no_grad()
def test_what_is_lost_is_an_error() -> None:
    """Of an argument that changes at every step there is no copy."""

    def use(x: Tensor, given: dict[str, Any]) -> Any:
        return given["residuals"].add_(1).sum()

    model, x = cachekit.wrap(UsesUp(use).eval(), every(1)), torch.randn(2, 8)
    for t in TIMES[:3]:
        model(x, t, residuals=torch.ones(2, 3))
        x = x + 0.01
    with pytest.raises(ModelError, match="writes into its argument residuals, and called its blocks otherwise"):
        model(x, TIMES[3], residuals=torch.ones(2, 3))


def test_under_inference_mode_nothing_is_lost() -> None:
    """Nobody counts there how often a tensor is written into, so that a copy is made of whatever nothing else keeps."""

    def use(x: Tensor, given: dict[str, Any]) -> Any:
        return given["residuals"].mul_(2).sum()

    torch.manual_seed(0)
    bare = UsesUp(use).eval()
    model, x = cachekit.wrap(copy.deepcopy(bare), every(1)), torch.randn(2, 8)
    with torch.inference_mode():
        for t in TIMES:
            residuals = torch.ones(2, 3), torch.ones(2, 3)
            assert torch.equal(bare(x, t, residuals=residuals[0]), model(x, t, residuals=residuals[1]))
            assert torch.equal(*residuals)
            x = x + 0.01
    assert stats(model).dropped == {"another sequence of blocks": 1}
