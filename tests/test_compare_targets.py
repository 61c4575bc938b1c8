"""Several targets side by side, bases, the shipped ones by name, and what a comparison says of the samples' quality."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import cachekit
from cachekit.demo import clips, fashion, quality, rows, shipped
from cachekit.demo.app import app
from cachekit.demo.bootstrap import Interval
from cachekit.demo.compare import Entry, compare_all
from cachekit.demo.frechet import frechet
from cachekit.demo.measure import Measured, relative_error
from cachekit.demo.noise import start
from cachekit.demo.report_quality import figure, quality_table, share
from cachekit.demo.target import Solver, Target
from cachekit.errors import ConfigError

QUIET = Console(quiet=True)

WEIGHTS = Path(__file__).parents[1] / "training" / "weights"


class Pixels:
    """Mean of each of four pixels; the real ones are normal."""

    name = "pixels"
    real: NDArray[np.float64] = np.random.default_rng(0).normal(size=(500, 4))

    def features(self, samples: Tensor) -> NDArray[np.float64]:
        found: NDArray[np.float64] = samples.flatten(1)[:, :4].double().numpy()
        return found


class Stack(nn.Module):
    """A stack of linear layers, each in a block."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return x


def small(depth: int, name: str = "DDIM", steps: int | None = 6) -> Target:
    torch.manual_seed(depth)
    model = Stack(depth).eval()

    def sample(seed: int, steps: int = 1) -> Tensor:
        x = torch.randn(60, 9, generator=torch.Generator().manual_seed(seed))
        for k in range(steps):
            x = x - 0.1 * model(x, torch.tensor([999 - 10 * k]))
        return x.reshape(60, 1, 3, 3)

    return Target(f"stack of {depth}", model, (Solver(name, sample, steps),), lambda seed: sample(seed, 50), (Pixels(),))


@pytest.mark.slow
def test_targets_side_by_side(tmp_path: Path) -> None:
    """Each at each base, with its own policies, and speed-ups against the last one as well."""
    entries = [Entry(small(4), ("every-2", "every-3"), "deep"), Entry(small(2), ("every-2",), "flat")]
    found = compare_all(entries, 2, tmp_path, QUIET, bases=(6, 4), fine=1)
    assert found == json.loads((tmp_path / "compare.json").read_text())
    assert [each["target"] for each in found] == ["stack of 4", "stack of 2"]
    for each, policies in zip(found, (["every-2", "every-3"], ["every-2"]), strict=True):
        assert list(each["solvers"]) == ["DDIM, 6 steps", "DDIM, 4 steps"]
        for steps, solver in zip((6, 4), each["solvers"].values(), strict=True):
            assert solver["steps"] == steps and solver["samples"] == 120
            assert [row["label"] for row in solver["rows"] if row["kind"] == "cached"] == policies
            assert all(len(row["errors"]) == 2 and len(row["errors_to_fine"]) == 1 for row in solver["rows"])
    deep, flat = (each["solvers"]["DDIM, 4 steps"]["rows"] for each in found)
    plain = np.median(flat[0]["seconds"])
    for row in deep + flat:
        assert row["speedup_against_plain"] == pytest.approx(plain / np.median(row["seconds"]))
    assert deep[-1]["blocks_total"] == 2 * flat[-1]["blocks_total"] == 16
    assert {"map-deep-ddim-6-steps.png", "map-flat-ddim-4-steps.png"} <= {path.name for path in tmp_path.iterdir()}


def test_targets_that_can_not_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different solvers"):
        compare_all([Entry(small(2), ()), Entry(small(2, "Euler"), ())], 1, tmp_path, QUIET)
    with pytest.raises(ConfigError, match="without a number of steps"):
        compare_all([Entry(small(2, steps=None), ())], 1, tmp_path, QUIET, bases=(5,))


def test_the_better_solvers_stand_in_the_first_ones_table_at_any_base() -> None:
    target = small(2)
    target = replace(target, solvers=(*target.solvers, Solver("Euler", target.solvers[0].sample, 6)))
    for solver, better in (
        (replace(target.solvers[0], steps=20), ["Euler, 13 steps", "Euler, 10 steps", "Euler, 7 steps"]),
        (target.solvers[1], []),
    ):
        found = rows.rows_for(target, solver, ("every-2",))
        assert [row.label for row in found if row.kind == "better"] == better


def test_policies_for_one_target() -> None:
    given = ["every-2", "a=every-3@skip-1", "b = plan:x.json"]
    assert rows.rows_of(["a", "b"], given) == [("every-2", "every-3@skip-1"), ("every-2", " plan:x.json")]
    with pytest.raises(ConfigError, match="for a target 'c'; there are a, b"):
        rows.rows_of(["a", "b"], ["c=every-2"])
    with pytest.raises(ConfigError, match="give each once"):
        rows.rows_of(["a", "a"], [])


def test_quality_is_its_definition() -> None:
    """PSNR written out, SSIM 1 for equal images only, distances those of the features, the uncached row compared with nothing."""
    pytest.importorskip("torchmetrics", reason="needs the extra [metrics]")
    rng = torch.Generator().manual_seed(0)
    uncached = torch.rand(150, 1, 12, 12, generator=rng)
    noisy = (uncached + 0.05 * torch.randn(uncached.shape, generator=rng)).clamp(0, 1)
    target = Target("t", nn.Identity(), (), real=(Pixels(),), pixels=lambda x: x)
    full, same, worse = quality.assess(target, [uncached, uncached.clone(), noisy])
    assert full.change == {} and full.psnr is None and full.ssim is None
    assert same.ssim is not None and same.ssim.value == pytest.approx(1.0, abs=1e-6) and same.psnr is None
    assert same.change["pixels"].value == 0.0 and same.frechet == full.frechet
    assert worse.psnr is not None and worse.ssim is not None and worse.ssim.high < 0.999
    psnr = -10 * ((noisy - uncached).double() ** 2).mean((1, 2, 3)).log10()
    # torchmetrics computes in single precision: seven digits of 26.
    assert worse.psnr.value == pytest.approx(float(psnr.mean()), abs=1e-4)
    # 1.96 standard errors each way, and the bootstrap's own noise of a few per cent.
    half = 1.96 * float(psnr.std()) / 150**0.5
    assert worse.psnr.high - worse.psnr.value == pytest.approx(half, rel=0.2)
    distances = [frechet(Pixels().features(x), Pixels.real) for x in (uncached, noisy)]
    assert worse.frechet["pixels"].value == pytest.approx(distances[1])
    assert worse.change["pixels"].value == pytest.approx(distances[1] / distances[0] - 1)
    assert worse.change["pixels"].known and worse.change["pixels"].low < worse.change["pixels"].value < worse.change["pixels"].high


def test_few_samples_have_no_interval_and_clips_are_measured_by_frame() -> None:
    pytest.importorskip("torchmetrics", reason="needs the extra [metrics]")
    rng = torch.Generator().manual_seed(0)
    uncached = torch.rand(6, 3, 4, 12, 12, generator=rng)
    noisy = (uncached + 0.05 * torch.randn(uncached.shape, generator=rng)).clamp(0, 1)
    target = Target("t", nn.Identity(), (), real=(Pixels(),), pixels=lambda x: x)
    _, worse = quality.assess(target, [uncached, noisy])
    assert worse.psnr is not None and not worse.psnr.known
    frames = -10 * ((noisy - uncached).double() ** 2).mean((1, 3, 4)).log10()
    assert worse.psnr.value == pytest.approx(float(frames.mean()), abs=1e-4)
    assert json.dumps(worse.as_json(), allow_nan=False)


def test_figures_as_they_are_shown() -> None:
    assert figure(Interval(1.23456, 1.0, 1.5), 2) == "1.23 [1.00, 1.50]" and figure(Interval(1.23456), 2) == "1.23"
    assert share(Interval(0.0123, -0.004, 0.03)) == "+1.2 [-0.4, +3.0] %" and share(None) == figure(None, 2) == ""
    solver = Solver("any", lambda seed, steps: torch.zeros(1), 4)
    row = Measured(rows.Row("uncached", "uncached", solver, 4), seconds=[2.0])
    plain = Measured(rows.Row("uncached", "uncached", solver, 4), seconds=[1.0])
    table = quality_table("any", [row], {"pixels": (1.0, 0.1)}, 20, plain)
    assert [str(column.header) for column in table.columns][1:5] == ["speed-up", "against plain", "Frechet, pixels", "to uncached"]
    assert [next(iter(column.cells)) for column in table.columns][:3] == ["uncached", "1.00x", "0.50x"]
    assert "No intervals" in str(table.caption)


@pytest.mark.parametrize(
    ("name", "build", "load"),
    [
        ("fashion_skip_dit", fashion.new_model, fashion.load_skip_dit),
        ("clips_skip_latte", clips.new_model, clips.load_skip_model),
        ("clips_latte", clips.new_model, clips.load_model),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_saved_as_the_trainings_save_them(
    name: str, build: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come back in every value that half precision keeps; where a file is missing, that is said."""
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=f"comes without {name}"):
        load()
    made = build()
    if "skip" in name:
        cachekit.add_long_skips(made, fusion="paper")
    (tmp_path / "weights").mkdir()
    save_file(
        {key: value.half().contiguous() for key, value in made.state_dict().items()}, tmp_path / "weights" / f"{name}.safetensors"
    )
    found = load()
    assert not found.training
    assert all(torch.equal(value.half().float(), found.state_dict()[key]) for key, value in made.state_dict().items())


@pytest.mark.slow
def test_the_real_features_of_the_second_network() -> None:
    """Of images and of clips: real ones are near to themselves, noise is far, and 32 components are kept."""
    efficientnet = pytest.importorskip("cachekit.demo.efficientnet")
    if not efficientnet.available():
        pytest.skip("needs the extra [metrics]")
    rng = torch.Generator().manual_seed(0)
    shapes = {"images": (60, 1, 28, 28), "clips": (40, 3, 2, 32, 32), "motion": (40, 3, 2, 32, 32)}
    for kind, shape in shapes.items():
        measure = efficientnet.Efficientnet("efficientnet_fashion" if kind == "images" else "efficientnet_clips", kind)
        assert measure.real.shape[1] == 32 and len(measure.real) >= 1000
        noise = measure.features(torch.rand(shape, generator=rng) * 2 - 1)
        assert noise.shape == (shape[0], 32)
        assert frechet(noise, measure.real) > 10 * frechet(measure.real[:500], measure.real[500:])


def test_the_command_line_takes_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"skip-dit": small(4), "plain": small(2)}
    monkeypatch.setattr("cachekit.demo.app.find_target", lambda name, samples: made[name])
    options = [
        "--target",
        "skip-dit",
        "-t",
        "plain",
        "-p",
        "every-2,skip-dit=every-3",
        "--steps",
        "6",
        "--seeds",
        "1",
        "--fine",
        "0",
    ]
    done = CliRunner().invoke(app, ["compare", *options, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "compare.json").read_text())
    labels = [[row["label"] for row in each["solvers"]["DDIM, 6 steps"]["rows"] if row["kind"] == "cached"] for each in found]
    assert labels == [["every-2", "every-3"], ["every-2"]]
    assert all(row["errors_to_fine"] == [] for row in found[0]["solvers"]["DDIM, 6 steps"]["rows"])
    assert "against plain" in done.output and "Frechet, pixels" in done.output


def test_without_a_target_the_skip_dit_is_shown_in_full_and_the_plain_one_in_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies may be for one of them; the fine solution is computed on two seeds, and of the Skip-DiT alone."""
    made = {"skip-dit": small(4), "plain": small(2)}
    monkeypatch.setattr("cachekit.demo.app.find_target", lambda name, samples: made[name])
    options = ["-p", "every-2,skip-dit=every-3", "--seeds", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["compare", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    full, short = (each["solvers"]["DDIM"]["rows"] for each in json.loads((tmp_path / "compare.json").read_text()))
    assert [row["label"] for row in short] == ["uncached", "every-2"] and short[0]["errors_to_fine"] == []
    assert [row["label"] for row in full][-2:] == ["every-2", "every-3"] and any(row["kind"] == "fewer" for row in full)
    assert [len(row["errors_to_fine"]) for row in full] == [2] * len(full)


def test_a_shipped_target_by_name() -> None:
    made = shipped.find_target("plain", 3)
    assert made.solvers[0].sample(0, 1).shape == (3, 1, 28, 28)
    with pytest.raises(ConfigError, match="or one of plain, skip-dit, retrofit, control, video, video-skip"):
        shipped.find_target("skip-dti", 3)


@pytest.mark.parametrize(("name", "file"), [("plain", "fashion_dit_1"), ("skip-dit", "fashion_skip_dit_1")])
def test_the_second_seeds_weights_are_of_the_same_models(name: str, file: str) -> None:
    """Those in training/weights fit, and are others than the shipped ones."""
    ours, theirs = shipped.find_target(name, 1).model, shipped.find_target(f"{name}:{WEIGHTS / file}.safetensors", 1).model
    assert all(torch.isfinite(value).all() for value in theirs.state_dict().values())
    assert any(not torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


def test_a_shipped_target_with_other_weights(tmp_path: Path) -> None:
    """Each with the fusions that it says; a file of another model is refused."""
    made = {"plain": fashion.new_model(), "skip-dit": cachekit.add_long_skips(fashion.new_model(), fusion="paper")}
    for name, model in made.items():
        save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
    for name, file, fusion in (("skip-dit", "skip-dit", "paper"), ("retrofit", "skip-dit", "residual"), ("control", "plain", None)):
        found = shipped.find_target(f"{name}:{tmp_path / file}.safetensors", 2)
        assert found.name.endswith(f", {file}")
        fusions = getattr(found.model, "long_skips", None)
        assert (fusions.fusion if fusions is not None else None) == fusion
    with pytest.raises(ConfigError, match="another model's weights"):
        shipped.find_target(f"plain:{tmp_path / 'skip-dit'}.safetensors", 2)
    with pytest.raises(ConfigError, match="there is no file of weights"):
        shipped.find_target("plain:nowhere.safetensors", 2)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 10))
def test_a_seed_has_the_same_noise_and_classes_beside_others(seeds: list[int], each: int, classes: int) -> None:
    noise, labels = start(seeds, each, (2, 3), classes)
    for n, seed in enumerate(seeds):
        alone = start(seed, each, (2, 3), classes)
        assert torch.equal(noise[n * each : (n + 1) * each], alone[0]) and torch.equal(labels[n * each : (n + 1) * each], alone[1])
    assert labels.tolist() == [(seed * each + i) % classes for seed in seeds for i in range(each)]


@pytest.mark.parametrize("kind", [fashion, clips])
def test_seeds_in_one_batch_give_what_each_gives_alone(kind: Any) -> None:
    model, steps, seeds = kind.new_model(), 2, (3, 8)
    apart = torch.cat([kind.sample(model, fashion.ddim(), seed, steps, 2) for seed in seeds])
    found = kind.sample(model, fashion.ddim(), seeds, steps, 2)
    assert torch.equal(kind.sample(model, fashion.ddim(), [3], steps, 2), apart[:2])
    # Products of a batch are summed in another order: errors of sqrt(512) roundings in each of eight products of matrices in each
    # of twelve blocks, were none to cancel another block's.
    bound = steps * 12 * 8 * 512**0.5 * torch.finfo(torch.float32).eps
    assert found.shape == apart.shape and relative_error(found, apart) < bound
