"""What a retrofit is measured by: the target, the original, deep features; its loss falls, and its log says so."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adding import shaken
from cases import Case
from retrofitting import STAGES, built, data_of, run, some_cases
from torch import Tensor, nn
from zoo import DIT

import cachekit
from cachekit import Distillation, Stage
from cachekit.distillation import Features, adjacent, distance, original_of, similarity, squared_error
from cachekit.long_skips import long_skips_of
from cachekit.training_log import read_log


def features_of(model: nn.Module, case: Case, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    features = Features(model, long_skips_of(model) or built(case).long_skips)
    with features.noted() as found:
        prediction = case.output(model(**inputs))
    features.remove()
    return found, prediction


@some_cases
def test_distillation_is_zero_at_a_residual_insertion_and_gradients_flow(case: Case) -> None:
    model = built(case)
    inputs, _ = data_of(case)(0)
    original = original_of(model)
    assert not hasattr(original, "long_skips") and not any(p.requires_grad for p in original.parameters())
    (ours, prediction), (theirs, taught) = features_of(model, case, inputs), features_of(original, case, inputs)
    assert ours.keys() == theirs.keys() == {connection.late for connection in model.long_skips.connections}
    assert distance(ours, theirs).item() == 0 and squared_error(prediction, taught).item() == 0
    ours, _ = features_of(shaken(model), case, inputs)
    lost = distance(ours, theirs)
    assert lost.item() > 0
    lost.backward()  # type: ignore[no-untyped-call]
    assert all(bool(parameter.grad.any()) for parameter in model.long_skips.parameters())
    assert all(parameter.grad is None for parameter in original.parameters())


@some_cases
def test_similarity_is_cosine_by_token_and_relative_distance(case: Case) -> None:
    found, _ = features_of(built(case), case, data_of(case)(0)[0])
    values = list(found.values())
    said = similarity("adjacent", adjacent(found))
    cosines = [torch.cosine_similarity(x, y, dim=-1).mean() for x, y in pairwise(values)]
    distances = [(y - x).norm() / x.norm() for x, y in pairwise(values)]
    assert torch.allclose(said["adjacent cosine"], torch.stack(cosines).mean(), atol=1e-6)
    assert torch.allclose(said["adjacent distance"], torch.stack(distances).mean(), atol=1e-6)


def test_the_original_drops_the_labels_that_the_model_drops(tmp_path: Path) -> None:
    """Or it would teach the prediction for a class where the model is asked without one."""
    model = built(DIT)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.5
    run(model, DIT, Stage(steps=1, train="fusions", distill=Distillation()), log=tmp_path / "log.jsonl")
    assert read_log(tmp_path / "log.jsonl")[0]["output"] == 0


@some_cases
@pytest.mark.parametrize("distill", [None, Distillation()], ids=["target", "distilled"])
def test_the_loss_falls_on_a_fixed_batch(case: Case, distill: Distillation | None, tmp_path: Path) -> None:
    inputs, target = data_of(case)(0)
    stages = [Stage(steps=20, train=train, lr=3e-3, distill=distill) for train in ("fusions", "all")]
    model = built(case, "paper")
    cachekit.retrofit(model, lambda step: (inputs, target), stages=stages, log=tmp_path / "log.jsonl", log_every=5, progress=False)
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert losses[3] < losses[0] and losses[-1] < 0.9 * losses[3]


def test_the_log_and_its_picture(tmp_path: Path) -> None:
    run(built(DIT), DIT, *STAGES, log=tmp_path / "new" / "log.jsonl", plot=tmp_path / "new" / "log.png", log_every=3)
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    # Every third, and the last of a stage.
    assert [(line["step"], line["stage"]) for line in lines] == [(3, 1), (4, 1), (6, 2), (9, 2)]
    first = ["step", "stage", "loss", "target", "output", "features", "gradient"]
    similar = ["adjacent cosine", "adjacent distance"]
    assert list(lines[0]) == [*first, *similar, "original cosine", "original distance"]
    assert list(lines[-1]) == ["step", "stage", "loss", "target", "gradient", *similar]
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["target"] + lines[0]["output"] + lines[0]["features"], rel=1e-5)
    assert (tmp_path / "new" / "log.png").read_bytes().startswith(b"\x89PNG")


def test_without_tqdm_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(steps=1, train="fusions")
    run(built(DIT), DIT, stage, progress=True)
    assert "1/1" in capsys.readouterr().err
    for name in ("tqdm", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    run(built(DIT), DIT, stage, progress=True, log=tmp_path / "log.jsonl")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(cachekit.ConfigError, match="pip install matplotlib"):
        run(built(DIT), DIT, stage, log=tmp_path / "log.jsonl", plot=tmp_path / "log.png")
