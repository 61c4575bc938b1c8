"""Mistakes in what a retrofit is given are refused, and say what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from retrofitting import FUSIONS, built, data_of, run, same, state_of
from zoo import DIT

import cachekit
from cachekit import Distillation, Stage


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": []}, r"stages=\[cachekit.Stage"),
        ({"stages": "paper"}, r"stages=\[cachekit.Stage"),
        ({"stages": [FUSIONS, "all"]}, r"stages=\[cachekit.Stage"),
        ({"ema": 1.0}, "ema"),
        ({"clip": 0}, "clip"),
        ({"save_every": 0}, "save_every"),
        ({"log_every": 0}, "log_every"),
        ({"seed": -1}, "seed"),
        ({"plot": "log.png"}, "give both"),
        ({"data": None}, "give a function of the step"),
        ({"data": lambda step: DIT.inputs(500)}, r"data\(0\) returned dict; return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500),)}, r"returned dict; return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500)["hidden_states"], None)}, r"return \(inputs, target\)"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(2, 9, 8, 8))}, "of half the channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(1, 4, 8, 8))}, "of half the channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(2, 8, 8, 7))}, "of half the channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(2, 5, 8, 8))}, "of half the channels"),
        ({"data": lambda step: (DIT.inputs(500), torch.zeros(4, 8, 8))}, "of half the channels"),
    ],
)
def test_mistakes_are_refused(options: dict[str, Any], says: str) -> None:
    model = built(DIT)
    before = state_of(model)
    with pytest.raises(cachekit.ConfigError, match=says):
        cachekit.retrofit(model, **{"data": data_of(DIT), "stages": [FUSIONS], "progress": False, **options})
    assert same(state_of(model), before)


@pytest.mark.parametrize("wrong", [{}, {"steps": 0}, {"steps": 5, "train": "deep"}, {"steps": 5, "lr": -1}, {"step": 5}])
def test_a_stage_says_what_it_needs(wrong: dict[str, Any]) -> None:
    with pytest.raises(cachekit.ConfigError, match=r"write cachekit.Stage\(steps=1000"):
        Stage(**{"train": "all", **wrong})
    with pytest.raises(cachekit.ConfigError, match="it takes target=, output=, features="):
        Distillation(output=-1)


def test_models_that_cannot_be_trained() -> None:
    with pytest.raises(cachekit.ModelError, match=r"cachekit.add_long_skips\(model\) first"):
        run(DIT.build(), DIT, FUSIONS)
    with pytest.raises(cachekit.ModelError, match=r"pipe\.transformer"):
        run("model", DIT, FUSIONS)
    model = built(DIT).requires_grad_(False)
    run(model, DIT, FUSIONS)
    with pytest.raises(cachekit.ModelError, match=r"model.requires_grad_\(True\) first"):
        run(model, DIT, FUSIONS, Stage(steps=1, train="all"))
    with torch.inference_mode():
        made = built(DIT)
    with pytest.raises(cachekit.ModelError, match="build the model outside"):
        run(made, DIT, FUSIONS)
    with pytest.raises(cachekit.ModelError, match="lower lr"):
        run(built(DIT, "paper"), DIT, Stage(steps=4, train="all", lr=1e20))
