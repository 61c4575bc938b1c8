"""The whole prediction as the only site: blocks are counted, and what changes under a generation is noticed all the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wrapping import stats

import cachekit
from cachekit.policies import every


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Model(nn.Module):
    """It computes in its weights' dtype, and may leave blocks out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.depth = 4

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype) + timestep[:, None] / 1000
        for block in list(self.blocks)[: self.depth]:
            x = block(x)
        return x


def shallow(model: Model) -> None:
    model.depth = 3


def double(model: Model) -> None:
    model.double()


@pytest.mark.parametrize(
    ("change", "reason"), [(shallow, "another sequence of blocks"), (double, "another shape, dtype or device")]
)
def test_a_model_that_changes_in_the_middle(change: Callable[[Model], None], reason: str) -> None:
    """Noticed at the next recompute: nothing from before is used any more, and it is counted."""
    torch.manual_seed(0)
    model, fresh = Model(), Model()
    fresh.load_state_dict(model.state_dict())
    cachekit.wrap(model, every(2), segments="model", reuse="taylor-1")
    x = torch.randn(2, 4)
    with torch.no_grad():
        for t in (900, 800):
            model(x + t / 1000, timestep=torch.full((2,), t))
        change(model)
        change(fresh)
        found = [model(x + t / 1000, timestep=torch.full((2,), t)) for t in (700, 600, 500)]
        expected = [fresh(x + t / 1000, timestep=torch.full((2,), t)) for t in (700, 600, 500)]
    seen = stats(model)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    # The only value of the changed model so far.
    assert torch.equal(found[1], expected[0])
    assert dict(seen.dropped) == {reason: 1}
    assert [record.recomputed for record in seen.records[2:]] == [(full,) * model.depth for full in (True, False, True)]


@pytest.mark.parametrize("result", [SimpleNamespace, np.asarray], ids=["namespace", "array"])
def test_a_result_in_which_no_tensor_is_seen(result: Callable[..., Any]) -> None:
    """What would be handed out again is the very object that the caller may have written into."""

    class Wrapped(Model):
        def forward(self, x: Tensor, timestep: Tensor) -> Any:
            found = super().forward(x, timestep)
            return result(found.numpy()) if result is np.asarray else result(sample=found)

    model = cachekit.wrap(Wrapped(), every(2), segments="model", adapter=cachekit.Adapter(range=1000))
    with torch.no_grad(), pytest.raises(cachekit.ConfigError, match="in which no tensor can be seen; return a tensor, or a tuple"):
        model(torch.randn(2, 4), timestep=torch.tensor([900.0, 900.0]))
