"""The clips and the video model's training: the games are played for real, briefly; the training runs on made-up clips."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from scripts import imported, run
from torch import Tensor

import cachekit
from cachekit.demo import clips, fashion


@pytest.fixture
def games(monkeypatch: pytest.MonkeyPatch) -> Any:
    return imported(monkeypatch, "training", "vizdoom_clips")


@pytest.fixture
def video(monkeypatch: pytest.MonkeyPatch) -> Any:
    return imported(monkeypatch, "training", "video_latte")


@pytest.fixture
def made_up(games: Any, tmp_path: Path) -> Path:
    """Two noisy clips of each scenario, in a file as the games' would be."""
    rng, path = np.random.default_rng(0), tmp_path / "made-up.npz"
    frames = rng.integers(0, 256, (16, 3, clips.FRAMES, clips.SIZE, clips.SIZE)).astype(np.uint8)
    settings = json.dumps(games.asdict(games.Settings(clips=2)), sort_keys=True)
    np.savez(path, clips=frames, labels=np.repeat(np.arange(8), 2), settings=np.array(settings))
    return path


def test_clips_are_the_same_again(games: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, however many are made; other splits and seeds are other games. Nothing is written beside the file."""
    pytest.importorskip("vizdoom", reason="needs the extra [training]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(games, "SCENARIOS", ("basic", "my_way_home"))
    first, labels = games.load(tmp_path / "clips.npz", games.Settings(clips=3, frames=4))
    assert [path.name for path in tmp_path.iterdir()] == ["clips.npz"]
    assert first.shape == (6, 3, 4, 32, 32) and first.dtype is torch.uint8 and labels.tolist() == [0, 0, 0, 1, 1, 1]
    shorter, _ = games.generate(games.Settings(clips=2, frames=4), progress=False)
    assert np.array_equal(shorter, first[[0, 1, 3, 4]].numpy())
    for changed in (games.Settings(clips=1, frames=4, split="test"), games.Settings(clips=1, frames=4, seed=1)):
        other, _ = games.generate(changed, progress=False)
        assert not any(np.array_equal(clip, known) for clip in other for known in first.numpy())
    moves = (first[:, :, 1:].int() - first[:, :, :-1].int()).abs().amax((1, 2, 3, 4))
    assert bool((moves > 0).all()), "a clip in which nothing moves"


def test_clips_made_otherwise_are_refused(games: Any, made_up: Path) -> None:
    found, labels = games.load(made_up, games.Settings(clips=2))
    assert len(found) == len(labels) == 16
    with pytest.raises(ValueError, match="was made with"):
        games.load(made_up, games.Settings(clips=2, seed=1))
    with pytest.raises(ValueError, match="write one of train, test"):
        games.Settings(split="tset")
    with pytest.raises(ValueError, match="above 0"):
        games.Settings(frames=0)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", [None, "paper"])
def test_a_video_training_that_was_stopped_ends_as_one_that_was_not(
    fusion: str | None, video: Any, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported weights are those of the whole run, fit the shipped shape, and leave out the short waves."""
    options = [] if fusion is None else ["--long-skips", fusion]
    short = ("--data", made_up, "--clips", 2, "--steps", 2, "--batch", 2, "--checkpoints", 1, "--log-every", 1, *options)
    for out, stops in (("whole", [2]), ("parts", [1, 2])):
        for until in stops:
            export = ("--out", tmp_path / out, "--export", tmp_path / f"{out}.safetensors", "--until", until)
            run(monkeypatch, video, *short, *export)
    whole, parts = (load_file(tmp_path / f"{out}.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text()
    model = clips.new_model()
    if fusion is not None:
        cachekit.add_long_skips(model, fusion=fusion)
        assert model.long_skips.pairs == ((0, 5), (1, 4), (2, 3))
    model.load_state_dict({key: value.float() for key, value in whole.items()})
    columns = whole["adaln_single.emb.timestep_embedder.linear_1.weight"].abs().amax(0)
    # diffusers' Timesteps(256, shift 0): wave k is 2 pi 10000^(k / 128); from k = 58 on it is 400 timesteps and longer.
    assert not columns[:58].any() and columns[58:128].all() and not columns[128:186].any() and columns[186:].all()


def test_both_trainings_start_from_one_model(video: Any) -> None:
    """So that the two differ by the fusions alone; and what the model is asked for does matter once it is trained."""
    states = []
    for fusion in (None, "residual"):
        torch.manual_seed(3)
        states.append(video.model_for(video.argparse.Namespace(long_skips=fusion)).state_dict())
    plain, skips = states
    assert all(torch.equal(value, skips[key]) for key, value in plain.items())
    assert {key.split(".")[0] for key in skips.keys() - plain.keys()} == {"long_skips"}


class Exact(torch.nn.Module):
    """Knows the one clip there is, and so predicts without error; its weight is zero, for the optimiser."""

    def __init__(self, clip: Tensor, predicts: str) -> None:
        super().__init__()
        self.clip, self.predicts = clip, predicts
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod

    def forward(self, noisy: Tensor, timestep: Tensor, **conditions: Any) -> Any:
        a = self.alphas[timestep].reshape(-1, 1, 1, 1, 1)
        noise = (noisy - a.sqrt() * self.clip) / (1 - a).sqrt()
        return SimpleNamespace(sample=(noise if self.predicts == "noise" else self.clip.expand_as(noisy)) + self.weight)


@pytest.mark.parametrize("predicts", ["noise", "sample"])
def test_the_loss_of_a_prediction_without_error_is_zero(predicts: str, video: Any, tmp_path: Path) -> None:
    """And that of the other kind is not."""
    clip = torch.rand(1, 3, 2, 4, 4) * 2 - 1
    args = video.argparse.Namespace(out=tmp_path, lr=0.0, batch=8, seed=0, steps=10)
    losses = {}
    for learnt in ("noise", "sample"):
        task = video.diffusion.Task(Exact(clip, predicts), clip, torch.zeros(1), lambda labels: {}, predicts=learnt)
        losses[learnt], _ = video.diffusion.Run(task, args).advance()
    # Of each timestep's rounding, 6e-8 of values around 1 is divided by sqrt(1 - a) >= .01: 6e-6, squared.
    assert losses.pop(predicts) < 1e-9
    assert all(loss > 0.1 for loss in losses.values())


def test_the_error_of_a_sample_counts_as_its_velocitys(video: Any, tmp_path: Path) -> None:
    """v = (sqrt(a) noisy - sample) / sqrt(1 - a), but for timesteps next to the data, where that would grow without bound."""
    clip, predicted, noise = torch.randn(3, 4, 3, 2, 4, 4, dtype=torch.float64)
    args = video.argparse.Namespace(out=tmp_path, lr=0.0, batch=4, seed=0, steps=10)
    run = video.diffusion.Run(
        video.diffusion.Task(Exact(clip, "sample"), clip, torch.zeros(4), lambda labels: {}, predicts="sample"), args
    )
    alphas = run.noising.alphas_cumprod.double()
    for low, high in ((900, 999), (300, 301), (80, 90)):
        t = torch.randint(low, high, (4,))
        a = alphas[t].reshape(-1, 1, 1, 1, 1)
        noisy = a.sqrt() * clip + (1 - a).sqrt() * noise
        error = (a.sqrt() * noisy - predicted) / (1 - a).sqrt() - (a.sqrt() * noise - (1 - a).sqrt() * clip)
        # The scheduler keeps its alphas in single precision: 6e-8 of them, divided by 1 - a >= .05.
        assert float(run.loss(predicted, clip, noise, t)) == pytest.approx(float(error.square().mean()), rel=1e-5)
    close = torch.zeros(4, dtype=torch.long)
    assert float(run.loss(predicted, clip, noise, close)) == pytest.approx(20 * float((predicted - clip).square().mean()))


def test_sampling_with_a_prediction_without_error_ends_at_the_clip() -> None:
    """So solvers and training mean the same by a prediction; DDIM's last step goes to the clean clip itself."""
    clip = torch.rand(1, 3, clips.FRAMES, clips.SIZE, clips.SIZE) * 2 - 1
    found = clips.sample(Exact(clip, "sample"), fashion.ddim(clips.PREDICTION), seed=0, steps=5, clips=1)
    # The scheduler's last timestep still has a = .9999 to it, where single precision knows the clip to 1e-5.
    assert torch.allclose(found, clip, atol=1e-4)


def test_a_caption_is_a_row_of_the_models_own_table() -> None:
    """The first layer of the caption projection, given a one-hot token, returns the class's column of its weight."""
    model, labels = clips.new_model(), torch.tensor([3, 0, 7])
    layer = model.caption_projection.linear_1
    with torch.no_grad():
        assert torch.allclose(layer(clips.caption(labels))[:, 0], layer.weight.T[labels] + layer.bias, atol=0)


def test_samples_of_a_seed_are_the_same_again_and_follow_their_class() -> None:
    model = clips.new_model()
    first = clips.sample(model, fashion.ddim(clips.PREDICTION), seed=0, steps=2, clips=2)
    assert first.shape == (2, 3, 8, 32, 32) and torch.equal(
        first, clips.sample(model, fashion.ddim(clips.PREDICTION), seed=0, steps=2, clips=2)
    )
    with torch.no_grad():
        x, t = first[:1], torch.tensor([500])
        a, b = (model(x, timestep=t, encoder_hidden_states=clips.caption(torch.tensor([k]))).sample for k in (0, 1))
    assert not torch.equal(a, b)
