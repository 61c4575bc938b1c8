"""What conditions a call in other forms than tensors: numbers and arrays of numpy, enumerations, bytes."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wrapping import stats

import cachekit
from cachekit.policies import first


class Mode(Enum):
    """A conditioning that is no number."""

    PLAIN = 0.0
    DOUBLED = 1.0


class Conditioned(nn.Module):
    """Two blocks, and what conditions them added in the end, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor, t: float, given: Any) -> Tensor:
        """x: (B, 8)."""
        for block in self.blocks:
            x = block(x)
        value = given.value if isinstance(given, Enum) else given[0] if isinstance(given, bytes) else np.sum(np.asarray(given))
        return x * 0 + float(value)


FORMS: list[Callable[[int], Any]] = [
    np.float32,
    np.float64,
    np.int64,
    np.bool_,
    lambda v: np.array([v, 0]),
    lambda v: np.array(v),
    lambda v: {"nested": [np.array([v])]}["nested"],
    lambda v: bytes([v]),
    Mode,
]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_changes_half_way_is_seen_in_any_form(form: Callable[[int], Any]) -> None:
    """Another value begins a branch; an equal one, however often it is made anew, goes on."""
    model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model"), torch.randn(2, 8)
    found = [float(model(x + 0.01 * k, 900.0 - 100 * k, form(int(k >= 2))).mean()) for k in range(4)]
    assert found == [0.0, 0.0, 1.0, 1.0]
    assert [all(record.recomputed) for record in stats(model).records] == [True, False, True, False]


@torch.no_grad()
def test_an_array_that_is_written_into_is_seen() -> None:
    """Its memory is that of the one before; its values are not."""
    model, x = cachekit.wrap(Conditioned().eval(), first(1), segments="model"), torch.randn(2, 8)
    given, found = np.zeros(3), []
    for k in range(4):
        given[0] = k >= 2
        found.append(float(model(x + 0.01 * k, 900.0 - 100 * k, given).mean()))
    assert found == [0.0, 0.0, 1.0, 1.0]
