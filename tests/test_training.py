"""The training scripts: made-up data stands in for the images; a run that was stopped ends as one that was not."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts import imported, run

import cachekit
from cachekit.demo.fashion import load_model, new_model

ROOT = Path(__file__).resolve().parents[1]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of Fashion-MNIST's format: one blob for each class."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 300), ("t10k", 1000)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 40, (n, 28, 28))
        for k, label in enumerate(labels):
            images[k, 2 * label : 2 * label + 8, 5:20] += 200
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_training_that_was_stopped_ends_as_one_that_was_not(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported weights are those of the whole run, fit the shipped shape, and leave out the short waves. So is the log, though
    a line of it begins before the checkpoint and was written after it already.
    """
    short, image_dit = (
        ("--data", data, "--steps", 4, "--batch", 4, "--checkpoints", 2, "--log-every", 3),
        imported(monkeypatch, "training", "image_dit"),
    )
    for out, stops in (("whole", [4]), ("parts", [3, 4])):
        for until in stops:
            export = ("--out", tmp_path / out, "--export", tmp_path / f"{out}.safetensors", "--until", until)
            run(monkeypatch, image_dit, *short, *export)
    whole, parts = (load_file(tmp_path / f"{out}.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == new_model().state_dict().keys()
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text() != ""
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    embedder = whole["transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.weight"]
    columns = embedder.abs().amax(0)
    assert not columns[:57].any() and columns[58:128].all() and not columns[128:185].any() and columns[186:].all()


@pytest.mark.slow
def test_a_skip_dit_from_scratch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped or not it ends alike, and what is exported fits the plain shape with the paper's long skip connections."""
    short = ("--data", data, "--steps", 4, "--batch", 4, "--checkpoints", 2)
    image_skip_dit = imported(monkeypatch, "training", "image_skip_dit")
    for out, stops in (("whole", [4]), ("parts", [2, 4])):
        for until in stops:
            export = ("--out", tmp_path / out, "--export", tmp_path / f"{out}.safetensors", "--until", until)
            run(monkeypatch, image_skip_dit, *short, *export)
    whole, parts = (load_file(tmp_path / f"{out}.safetensors") for out in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    model = cachekit.add_long_skips(new_model(), fusion="paper")
    model.load_state_dict({key: value.float() for key, value in whole.items()})


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True])
def test_a_retrofit_and_its_control(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: bool) -> None:
    """Both start from the shipped weights, log their losses, and leave the short waves out; the control has no fusions."""
    short = ("--data", data, "--batch", 4, "--fusions", 1, "--everything", 2, "--log-every", 1)
    said = ("--out", tmp_path, "--export", tmp_path / "made.safetensors", *(["--control"] if control else []))
    run(monkeypatch, imported(monkeypatch, "training", "image_retrofit"), *short, *said)
    model, made = load_model(), load_file(tmp_path / "made.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if not control:
        cachekit.add_long_skips(model)
    model.load_state_dict({key: value.float() for key, value in made.items()})
    embedder = "transformer_blocks.3.norm1.emb.timestep_embedder.linear_1.weight"
    assert not made[embedder][:, :57].any() and not torch.equal(made[embedder].float(), before[embedder])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_retrofit_that_is_bounded_and_learns_from_the_original(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file has what the fusions multiply by, at most the bound, so that residual ones read it: half precision adds 2^-11."""
    short = ("--data", data, "--batch", 4, "--fusions", 3, "--everything", 1, "--log-every", 1, "--bound", 0.01, "--distill", 1)
    said = ("--out", tmp_path, "--export", tmp_path / "made.safetensors")
    run(monkeypatch, imported(monkeypatch, "training", "image_retrofit"), *short, *said)
    made = load_file(tmp_path / "made.safetensors")
    cachekit.add_long_skips(load_model()).load_state_dict({key: value.float() for key, value in made.items()})
    largest = [float(torch.linalg.svdvals(made[f"long_skips.{k}_to_{7 - k}.linear.weight"].float())[0]) for k in range(4)]
    assert all(0.009 < sigma < 0.01 * (1 + 2**-10) for sigma in largest)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["target"] + first["output"] + first["features"])


@pytest.mark.parametrize("other", [("--bound", 0.1), ("--fusion", "paper"), ("--distill", 1)])
def test_a_control_with_settings_of_a_retrofit_is_refused(
    tmp_path: Path, other: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = imported(monkeypatch, "training", "image_retrofit")
    with pytest.raises(SystemExit):
        run(monkeypatch, script, "--data", tmp_path, "--out", tmp_path, "--control", *other)
    assert str(other[0]) in capsys.readouterr().err


@pytest.mark.slow
def test_the_classifier_learns(data: Path, tmp_path: Path) -> None:
    log, export = tmp_path / "log.jsonl", tmp_path / "features.safetensors"
    done = script("features.py", "--data", data, "--log", log, "--export", export, "--steps", 150)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["test accuracy"] > 0.5
    assert lines[0]["loss"] > lines[-2]["loss"]
    assert load_file(export)["real"].shape == (1000, 16)


def test_what_is_no_such_file_is_told(tmp_path: Path) -> None:
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 10) + b"short"))
    done = script("features.py", "--data", tmp_path, "--log", tmp_path / "log.jsonl")
    assert done.returncode != 0
    assert "is cut short" in done.stderr
