"""Models with long skip connections added, as their tests share them."""

from __future__ import annotations

from typing import Any

import original_zoo
import pytest
import torch
from cases import Case
from torch import Tensor, nn
from zoo import CASES, DIT, FLUX, LATTE, SD3

ADDABLE = (*CASES, *(case for case in original_zoo.ORIGINALS if case is not original_zoo.HUNYUAN_VIDEO))
QUICK = (DIT, LATTE, FLUX, SD3, original_zoo.LATTE)
all_cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in ADDABLE]
)
some_cases = pytest.mark.parametrize("case", [DIT, LATTE, SD3], ids=str)
fusions = pytest.mark.parametrize("fusion", ["paper", "residual", "spectral"])


class Mean(nn.Module):
    """A fusion of a user's own, with a list inside that is no stack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return (self.layers[0](x) + self.layers[1](skip)) / 2  # type: ignore[no-any-return]


def output(model: nn.Module, case: Case, t: float = 500, **options: Any) -> Tensor:
    return case.output(model(**case.inputs(t, **options)))


def shaken(model: Any, seed: int = 5) -> Any:
    """The same model, with fusions that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.long_skips.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model
