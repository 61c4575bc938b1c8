"""What the tests of retrofitting share: short trainings on noise that is drawn anew at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor, nn
from zoo import DIT, LATTE

import cachekit
from cachekit import Distillation, Stage

State = dict[str, Tensor]
Data = Callable[[int], tuple[dict[str, Any], Tensor]]
some_cases = pytest.mark.parametrize("case", [DIT, LATTE], ids=str)
FUSIONS = Stage(steps=1, train="fusions")
STAGES = (
    Stage(steps=4, train="fusions", distill=Distillation(target=0.5)),
    Stage(steps=5, train="all", lr=1e-3),
)


class Stopped(Exception):
    pass


def data_of(case: Case) -> Data:
    """Noise to be predicted, drawn from torch's global generator, for which ``retrofit`` answers."""

    def data(step: int) -> tuple[dict[str, Any], Tensor]:
        inputs = case.inputs(float(torch.randint(1, 999, ())), seed=step)
        return inputs, torch.randn_like(inputs[case.names[0]])

    return data


def built(case: Case, fusion: str = "residual") -> Any:
    return cachekit.add_long_skips(case.build(), fusion=fusion, seed=0)


def state_of(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def run(model: Any, case: Case, *stages: Stage, **options: Any) -> State:
    cachekit.retrofit(model, data_of(case), stages=stages, **{"progress": False, **options})
    return state_of(model)
