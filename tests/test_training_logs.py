"""Running a training again with its seed, on the real data, gives the beginning of the log that stands beside it.

Fashion-MNIST is read from the folder in CACHEKIT_FASHION_MNIST; see CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, imported, run
from torch import nn

LOGS = ROOT / "training" / "logs"
# Relative. With one thread or two, and with AVX-512, AVX2 or neither, the first lines differed by 2e-5 at most; those of another
# seed by 1e-3 and more. Later on small differences grow: by step 100 the classifier's were 8e-4.
TOLERANCE = 2e-4
VARIABLE = "CACHEKIT_FASHION_MNIST"


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def fashion_mnist() -> Path:
    """The folder with the images; the test is skipped where there is none."""
    folder = os.environ.get(VARIABLE)
    if not folder or not Path(folder, "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"set {VARIABLE} to a folder with Fashion-MNIST's gzipped IDX files")
    return Path(folder)


def known(name: str) -> list[dict[str, float]]:
    """A log of training/logs; the test is skipped while that model has not been trained."""
    if not (LOGS / name).exists():
        pytest.skip(f"there is no training/logs/{name}: that model has not been trained yet")
    return lines(LOGS / name)


def assert_beginning(found: list[dict[str, float]], log: list[dict[str, float]]) -> None:
    assert found
    for ours, theirs in zip(found, log[: len(found)], strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        assert ours.get("lr") == theirs.get("lr")
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_the_classifiers_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, log = imported(monkeypatch, "training", "features"), known("features.jsonl")
    run(monkeypatch, script, "--data", fashion_mnist(), "--log", tmp_path / "log.jsonl", "--until", log[0]["step"])
    assert_beginning(lines(tmp_path / "log.jsonl"), log)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["image_dit", "image_skip_dit"])
def test_an_image_models_log(name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first 300 steps, two and a half minutes on a core; the first 100 of the second seed."""
    script, log = imported(monkeypatch, "training", name), known(f"{name}_{seed}.jsonl" if seed else f"{name}.jsonl")
    until = log[0 if seed else 2]["step"]
    run(monkeypatch, script, "--data", fashion_mnist(), "--out", tmp_path, "--seed", seed, "--until", until)
    assert_beginning(lines(tmp_path / "log.jsonl"), log)


SHORT = ["--fusions", 50, "--everything", 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("image_retrofit", SHORT), ("image_control", ["--control", *SHORT])],
)
def test_a_retrofits_log(name: str, options: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its learning rate is constant within a stage, so that a shorter one begins alike."""
    script, log = imported(monkeypatch, "training", "image_retrofit"), known(f"{name}.jsonl")
    run(monkeypatch, script, "--data", fashion_mnist(), "--out", tmp_path, *options)
    assert_beginning([line for line in lines(tmp_path / "log.jsonl") if line["step"] == 50], log)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("video_latte", []), ("video_skip_latte", ["--long-skips", "paper"])])
def test_a_video_models_log(name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the clips that these steps draw are made: all of them would take longer than the steps."""
    log = known(f"{name}.jsonl")
    pytest.importorskip("vizdoom", reason="needs the extra [training]")
    script = imported(monkeypatch, "training", "video_latte")
    steps = int(log[1]["step"])

    def load(path: Path, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return drawn_clips(script, settings, script.options().get_default("batch"), steps)

    monkeypatch.setattr(script.vizdoom_clips, "load", load)
    run(monkeypatch, script, "--data", tmp_path / "none.npz", "--out", tmp_path, "--until", steps, *options)
    assert_beginning(lines(tmp_path / "log.jsonl"), log)


def drawn_clips(script: Any, settings: Any, batch: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All clips and labels, as ``vizdoom_clips.load`` gives them, but zeros where these steps of seed 0 never look."""
    games, count = script.vizdoom_clips, settings.clips
    places = torch.arange(len(games.SCENARIOS) * count)
    stand_in = script.diffusion.Task(nn.Identity(), places, places, conditions=lambda labels: {})
    drawn = {int(place) for step in range(steps) for place in script.diffusion.batch(stand_in, batch, 0, step)[1]}
    clips = torch.zeros(len(places), 3, settings.frames, settings.size, settings.size, dtype=torch.uint8)
    for label in range(len(games.SCENARIOS)):
        chosen = sorted(place - label * count for place in drawn if place // count == label)
        for k, clip in zip(chosen, games.play(settings, label, chosen), strict=True):
            clips[label * count + k] = torch.from_numpy(clip).permute(3, 0, 1, 2)
    return clips, places // count


def test_only_what_is_never_drawn_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above trains on what the training trains on."""
    pytest.importorskip("vizdoom", reason="needs the extra [training]")
    script = imported(monkeypatch, "training", "video_latte")
    games = script.vizdoom_clips
    monkeypatch.setattr(games, "SCENARIOS", ("basic", "my_way_home"))
    settings = games.Settings(clips=5, frames=2)
    whole, labels = games.generate(settings, progress=False)
    clips, found = drawn_clips(script, settings, batch=2, steps=2)
    assert found.tolist() == labels.tolist()
    made = [k for k, clip in enumerate(clips) if bool(clip.any())]
    assert 1 < len(made) <= 4 and all(torch.equal(clips[k], torch.from_numpy(whole[k])) for k in made)
    for step in range(2):
        task = script.diffusion.Task(nn.Identity(), clips, found, conditions=lambda labels: {})
        full = script.diffusion.Task(nn.Identity(), torch.from_numpy(whole), found, conditions=lambda labels: {})
        ours, theirs = (script.diffusion.batch(each, 2, 0, step) for each in (task, full))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
