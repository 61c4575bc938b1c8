"""benchmarks/smoothness.py: on models whose smoothness is known, and against the formulas written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from cases import Case
from scripts import imported, run
from torch import Tensor, nn
from zoo import DIT, LATTE

TARGETS = """
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import cachekit


def plain(skips=False):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=4, sample_size=4, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    if skips:
        cachekit.add_long_skips(model, fusion="paper", seed=0)

    def sample(seed, steps=50):
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample, t, x).prev_sample
        return x

    return model, sample


def skips():
    return plain(True)
"""


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Any:
    return imported(monkeypatch, "benchmarks", "smoothness_measures")


class Blocks(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Affine(nn.Module):
    """factor * x + offset. A list of modules without children would be no stack."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.factor, self.offset = nn.Parameter(torch.tensor([factor])), offset

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.offset


def test_a_model_with_constant_output_has_no_change(measures: Any) -> None:
    """And one that scales its input changes as much as its input does."""
    model = Blocks([Affine(2.0), Affine(0.0, 3.0), Affine(0.0)])
    inputs = [
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([[1.0, 1.0], [0.0, 2.0]]),
        torch.tensor([[-1.0, -1.0], [0.0, 1.0]]),
    ]

    def generate() -> None:
        for k, x in enumerate(inputs):
            model(x, torch.tensor([900 - k]))

    found = measures.dynamics(model, generate)
    assert found.blocks == ("blocks.0", "blocks.1", "blocks.2") and found.change.shape == found.cosine.shape == (2, 2, 3)
    assert np.array_equal(found.change[:, :, 1:], np.zeros((2, 2, 2))), "constant outputs, zero among them"
    assert np.array_equal(found.cosine[:, :, 1:], np.ones((2, 2, 2)))
    # Rows as written above: (1,0) -> (1,1) -> (-1,-1), and (0,2) -> (0,2) -> (0,1).
    assert found.change[:, :, 0] == pytest.approx(np.array([[1.0, 2.0], [0.0, 0.5]]))
    assert found.cosine[:, :, 0] == pytest.approx(np.array([[np.sqrt(0.5), -1.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="two steps at least"):
        measures.dynamics(model, lambda: model(inputs[0], torch.tensor([1])))


@pytest.mark.parametrize("case", [DIT, LATTE], ids=str)
def test_the_features_are_those_of_each_sample(case: Case, measures: Any) -> None:
    """Against each sample run alone: rows must not be mixed where a model lays frames and tokens into the batch."""
    model, steps = case.build().double(), (900.0, 600.0, 300.0)
    calls = [case.inputs(t, dtype=torch.float64) for t in steps]

    def rows(call: dict[str, Any], chosen: slice) -> dict[str, Any]:
        return {key: value[chosen] if isinstance(value, Tensor) else value for key, value in call.items()}

    both, *alone = (
        measures.dynamics(model, lambda chosen=chosen: [model(**rows(call, chosen)) for call in calls])
        for chosen in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    assert both.blocks == case.stack
    for kind in ("change", "cosine"):
        expected = np.concatenate([getattr(each, kind) for each in alone])
        # Matrix products of another batch size may add in another order: some hundred roundings of 1.1e-16 a block.
        assert getattr(both, kind) == pytest.approx(expected, abs=1e-12)
        assert not np.allclose(expected[0], expected[1])


def test_no_perturbation_changes_nothing(measures: Any) -> None:
    """Cosine 1 in the middle of the landscape, and the weights are as they were afterwards."""
    torch.manual_seed(0)
    model = Blocks([nn.Linear(6, 6), nn.Linear(6, 6)])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls: list[Any] = [((torch.randn(3, 6), torch.tensor([5])), {}), ((torch.randn(3, 6), torch.tensor([4])), {})]
    found = measures.landscape(model, calls, seed=0, grid=[-0.5, 0.0, 0.5])
    assert found[1, 1] == 1.0 and (np.delete(found.ravel(), 4) < 0.999).all() and (found > -1).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.array_equal(found, measures.landscape(model, calls, seed=0, grid=[-0.5, 0.0, 0.5]))
    assert not np.array_equal(found, measures.landscape(model, calls, seed=1, grid=[-0.5, 0.0, 0.5]))


def test_the_landscape_is_its_formula(measures: Any) -> None:
    """On one linear layer, theta + a d1 + b d2 and the cosine, written out."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    model, x = Blocks([layer]), torch.randn(1, 4, dtype=torch.float64)
    rng = torch.Generator().manual_seed(7)
    d1, d2 = (torch.randn(4, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    d1, d2 = (d * layer.weight.norm() / d.norm() for d in (d1, d2))
    with torch.no_grad():
        y, moved = x @ layer.weight.T, x @ (layer.weight + 0.3 * d1 - 0.2 * d2).T
    expected = float((y * moved).sum() / (y.norm() * moved.norm()))
    found = measures.landscape(model, [((x, torch.tensor([1])), {})], seed=7, grid=[0.3, -0.2])
    # Four sums of a handful of float64 products: some tens of roundings of 1.1e-16.
    assert found[0, 1] == pytest.approx(expected, abs=1e-14)


def test_directions_have_each_parameters_norm(measures: Any) -> None:
    """Zeros that training holds at zero stay, and a parameter of zeros only has no direction."""
    parameters = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(5), torch.randn(100)]
    found = measures.direction(parameters, torch.Generator().manual_seed(0))
    assert [float(each.norm()) for each in found] == pytest.approx([5.0, 0.0, float(parameters[2].norm())])
    assert found[0][0, 1] == found[0][1, 0] == 0.0


def test_calls_are_taken_evenly(measures: Any) -> None:
    model = Blocks([Affine(1.0), Affine(1.0)])

    def generate() -> None:
        x = torch.zeros(1, 1)
        for k in range(9):
            model(x.add_(1), torch.tensor([k]))

    calls = measures.recorded(model, generate, 3)
    assert [(float(args[0]), int(args[1])) for args, _ in calls] == [(1.0, 0), (5.0, 4), (9.0, 8)], "with what x held at the time"
    assert not model._forward_pre_hooks


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two small models, from the command line to figures and pictures."""
    (tmp_path / "smooth_targets.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    script = imported(monkeypatch, "benchmarks", "smoothness")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ("--steps", 4, "--seeds", 2, "--calls", 2, "--radius", 0.5, 0.1, "--out", "out")
    run(monkeypatch, script, "--plain", "smooth_targets:plain", "--skips", "smooth_targets:skips", *options)
    written = json.loads((tmp_path / "out" / "smoothness.json").read_text())
    plain, skips = written["models"]
    assert np.shape(plain["dynamics"][1]["change"]) == (3, 4) and np.shape(skips["landscapes"]["0.5"]) == (2, 7, 7)
    assert plain["landscapes"]["0.5"][0][3][3] == 1.0 == skips["landscapes"]["0.1"][1][3][3]
    assert np.mean(plain["landscapes"]["0.5"]) < np.mean(plain["landscapes"]["0.1"]) < 1.0
    assert plain["dynamics"][0] != plain["dynamics"][1] and plain["dynamics"] != skips["dynamics"]
    mean = np.mean([np.mean(each["change"]) for each in plain["dynamics"]])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("relative change from step to step, all"))
    assert f"{mean:.4f} ±" in line
    for name in ("dynamics", "landscape"):
        assert matplotlib.image.imread(tmp_path / "out" / f"{name}.png").std() > 0.05, "a picture with something on it"
