"""``cachekit compare``: the shipped target and one's own, from the command line to the files that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import cachekit
from cachekit.demo import cli, fashion, frechet, measure, report, rows
from cachekit.demo.app import app
from cachekit.demo.pareto import front
from cachekit.demo.target import Solver, Target, as_target, load_target

MODULE = """
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel


def factory():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=4, sample_size=4, patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()

    def sample(seed, steps=12):
        scheduler = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            noise = model(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample
            x = scheduler.step(noise, t, x).prev_sample
        return x

    return model, sample


nothing = 3


def wrong():
    return "a model"


def stepless():
    return factory()[0], lambda seed, steps: None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    (tmp_path / "own_target.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_target", raising=False)
    return "own_target"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)


def written(folder: Path) -> Any:
    return json.loads((folder / "compare.json").read_text())


def test_ones_own_target(own: str, tmp_path: Path) -> None:
    """Two policies, two seeds: every row is there with a number for each seed, and what was skipped was counted."""
    done = run(f"{own}:factory", "--policies", "skip-every-2@model,every-3/output", "-p", "every-1", "--seeds", "2", "--out", "o")
    assert done.exit_code == 0, done.output
    found = written(tmp_path / "o")
    (solver,) = found["solvers"].values()
    by_label = {row["label"]: row for row in solver["rows"]}
    assert next(iter(by_label)) == "uncached" and {"skip-every-2@model", "every-3/output", "every-1"} <= by_label.keys()
    assert all(len(row["errors"]) == len(row["seconds"]) == 2 for row in by_label.values())
    assert by_label["every-1"]["errors"] == [0.0, 0.0] == by_label["uncached"]["errors"]
    assert all(error > 0 for error in by_label["every-3/output"]["errors"] + by_label["6 steps"]["errors"])
    assert (by_label["every-3/output"]["blocks_run"], by_label["every-3/output"]["blocks_total"]) == (4 * 4 + 8 * 2, 48)
    assert by_label["every-1"]["blocks_run"] == 48
    for label in by_label:
        assert label in done.output
    assert (tmp_path / "o" / "map-the-sampler.png").exists()
    pareto = matplotlib.image.imread(tmp_path / "o" / "pareto-the-sampler.png")
    # Axes, ticks and letters are black on white.
    assert (pareto[..., :3] < 0.5).all(axis=-1).mean() > 0.005, "a picture with something on it"


# Item 7 of what was promised: every one of these can be compared, wherever its file lies.
SPECS = (
    *("fora-3", "delta-dit-3", "pab", "tgate-20-2", "teacache-0.2", "first-block-0.1", "dbcache-8-0-0.08", "adacache"),
    *("magcache-0.06", "easycache-0.025", "taylorseer-3-1", "hicache-3-2", "foca-3", "speca-0.3", "toca-3-0.07", "duca-3-0.05"),
    "fastercache",
)
FILES = ("plan:{}/plan.json", "{}/plan.json", "smoothcache-0.1:{}/c.json", "teacache-0.2:{}/c.json")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan and a calibration of the module's model, in a folder whose name has all that a spec's parts are told by."""
    folder = tmp_path_factory.mktemp("runs") / "1,b@model" / "c.json"
    folder.mkdir(parents=True)
    given: dict[str, Any] = {}
    exec(MODULE, given)
    model, sample = given["factory"]()
    calibration = cachekit.calibrate(model, sample, runs=1, sites=("middle", "attn", "mlp"), probes=(1,), progress=False)
    calibration.save(folder / "c.json")
    calibration.save(folder.parent / "c")
    cachekit.search(calibration, model, sample, budget=6, sites=("middle",), tries=1, progress=False).best.save(
        folder / "plan.json"
    )
    return folder


@pytest.mark.parametrize(
    ("suffix", "segments", "reuse"), [("", None, None), ("@model", "model", None), ("/output", None, "output")]
)
def test_every_spec_is_read_with_its_suffixes(kept: Path, suffix: str, segments: str | None, reuse: str | None) -> None:
    solver = Solver("any", lambda seed, steps: torch.zeros(1), 4)
    for spec in (*SPECS, *(text.format(kept) for text in FILES)):
        for text in (spec, f"{spec} | every-2", f"every-2 & {spec}"):
            row = rows.parse_cached(f"{text}{suffix}@skip-1/taylor-1" if not suffix else f"{text}{suffix}", solver)
            wanted = (text, "skip-1", "taylor-1") if not suffix else (text, segments, reuse)
            assert (row.policy, row.segments, row.reuse) == wanted
        assert rows.parse_cached(spec, solver).policy == spec
        if ":" in spec or "/" not in spec:
            several = ["every-3", f"{spec}{suffix}", spec, "every-2"]
            assert rows.split_policies(",".join(several)) == several
        assert rows.rows_of(["plain", "skip"], [f"{spec}{suffix}", f"skip={spec}"])[1] == (f"{spec}{suffix}", spec)


def test_a_file_of_any_name(kept: Path) -> None:
    """One without an ending goes to the end of its policy; what stands behind another policy is none of its name."""
    solver = Solver("any", lambda seed, steps: torch.zeros(1), 4)
    assert rows.parse_cached(f"smoothcache-0.1:{kept.parent}/c", solver).policy == f"smoothcache-0.1:{kept.parent}/c"
    row = rows.parse_cached(f"smoothcache-0.1:{kept.parent}/c | every-2@attn/output", solver)
    assert (row.policy, row.segments, row.reuse) == (f"smoothcache-0.1:{kept.parent}/c | every-2", "attn", "output")
    assert rows.rows_of(["plain"], ["plan:/runs/n=1/plan.json"]) == [("plan:/runs/n=1/plan.json",)]
    assert rows.rows_of(["skip:w.pt"], ["skip:w.pt=plan:/runs/n=1/plan.json"]) == [("plan:/runs/n=1/plan.json",)]
    assert rows.split_policies("skip:w.pt=every-2,plan.json,plan:./a,every-3") == [
        "skip:w.pt=every-2",
        "plan.json",
        "plan:./a",
        "every-3",
    ]
    with pytest.raises(cachekit.ConfigError, match=r"no calibration to read at .*c/output"):
        rows.parse_cached(f"smoothcache-0.1:{kept.parent}/c/output", solver)


def test_plans_and_calibrations_are_compared(own: str, kept: Path, tmp_path: Path) -> None:
    """By absolute and relative paths, several in one option, and with other segments and reuse."""
    (tmp_path / "c.json").write_bytes((kept / "c.json").read_bytes())
    specs = (
        f"plan:{kept}/plan.json",
        f"plan:{kept}/plan.json@model/taylor-1",
        f"smoothcache-0.9:{kept}/c.json",
        "smoothcache-0.9:./c.json",
    )
    done = run(f"{own}:factory", "-p", ",".join(specs), "--seeds", "1", "--out", "o")
    assert done.exit_code == 0, done.output
    (solver,) = written(tmp_path / "o")["solvers"].values()
    by_label = {row["label"]: row for row in solver["rows"]}
    plan, model, smooth, same = (by_label[spec] for spec in specs)
    assert plan["blocks_run"] == 6 * 4 + 6 * 2 and model["blocks_run"] == 6 * 4
    assert smooth["errors"] == same["errors"] and min(smooth["errors"] + plan["errors"] + model["errors"]) > 0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8))
def test_the_pareto_front_is_what_none_beats(points: list[tuple[int, int]]) -> None:
    def beaten(a: tuple[int, int]) -> bool:
        return any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)

    kept = front(points)
    assert [points[k] for k in kept] == sorted({point for point in points if not beaten(point)})
    assert all(k == points.index(points[k]) for k in kept)


@pytest.mark.slow
def test_the_shipped_target(tmp_path: Path) -> None:
    """The Skip-DiT beside the plain DiT, with fewer rows and seeds: tables, pictures, sentences, distances near real images'."""
    done = run("-p", "skip-every-2@model", "--seeds", "2", "--images", "10", "--fine", "1", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found, plain = written(tmp_path)
    assert "Skip-DiT" in found["target"] and "Skip" not in plain["target"]
    for solver in plain["solvers"].values():
        assert [row["label"] for row in solver["rows"]] == ["uncached", "skip-every-2@model"], "in short"
        assert solver["rows"][0]["frechet"] < 4 and solver["rows"][0]["speedup_against_plain"] == 1.0
    assert list(found["solvers"]) == ["DDIM", "DPM-Solver++(2M)"]
    for name, steps in (("DDIM", 50), ("DPM-Solver++(2M)", 30)):
        solver = found["solvers"][name]
        assert solver["steps"] == steps and solver["samples"] == 20
        cached = solver["rows"][-1]
        fewer = next(row for row in solver["rows"] if row["label"] == f"{steps // 2} steps")
        assert np.mean(cached["errors"]) < np.mean(fewer["errors"])
        assert cached["blocks_run"] < 0.6 * cached["blocks_total"]
        # Twenty images of uniform noise are at 12.7, twenty real ones at 2.0 on average.
        assert solver["rows"][0]["frechet"] < 4
    assert any("the solver matters more than the cache" in said.lower() for said in found["solvers"]["DDIM"]["verdict"])
    grid = matplotlib.image.imread(tmp_path / "samples-skip-dit-ddim.png")
    assert grid.std() > 0.1, "a picture with something on it"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"{kind}-{name}-{solver}.png"
        for kind in ("map", "pareto", "samples")
        for name in ("plain", "skip-dit")
        for solver in ("ddim", "dpm-solver-2m")
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere_at_all:factory",), "no module 'nowhere_at_all'"),
        (("own_target",), "package.module:factory"),
        (("own_target:nothing",), "no function 'nothing'"),
        (("own_target:wrong",), "return (model, sample)"),
        (("own_target:stepless",), "give steps a default"),
        (("own_target:factory", "-p", "evry-2"), "unknown policy 'evry-2'"),
        (("own_target:factory", "-p", "@model"), "names no policy"),
        (("own_target:factory", "-p", "every-2/held"), "unknown reuse 'held'"),
        (("own_target:factory", "-p", "every-2@centre"), "unknown segments='centre'"),
        (("own_target:factory", "-p", "plan:/nowhere/at/all.json"), "no plan to read at '/nowhere/at/all.json'"),
        (("own_target:factory", "-p", "plan:/nowhere/all.json@model/held"), "no plan to read at '/nowhere/all.json'"),
        (("own_target:factory", "-p", "fora-3 | first-block-0.1@middle"), "two presets with different reuse"),
        (("own_target:factory", "-p", "smoothcache-0.1"), "smoothcache-0.1 needs a calibration"),
    ],
    ids=str,
)
def test_mistakes_are_told(own: str, arguments: tuple[str, ...], says: str) -> None:
    """In a line, with the exit code of a wrong call, and no traceback."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cachekit.demo.app", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main()  # not one of the extra's packages: nothing is to be hidden
    monkeypatch.delitem(sys.modules, "cachekit.demo.app")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "cachekit.demo.compare", None)
    monkeypatch.delitem(sys.modules, "cachekit.demo.compare")
    with pytest.raises(SystemExit, match=r"pip install 'cachekit-dit\[demo\]'"):
        cli.main()


def test_a_target_may_be_anything_that_samples(own: str) -> None:
    made = load_target(f"{own}:factory")
    assert isinstance(made, Target) and made.solvers[0].steps == 12
    assert as_target(made, "again") is made
    fixed = as_target((nn.Linear(1, 1), lambda seed: torch.full((1,), float(seed))), "fixed")
    assert fixed.solvers[0].steps is None
    assert fixed.solvers[0].run(3).item() == 3.0
    assert [row.label for row in rows.rows_for(fixed, fixed.solvers[0], ("every-2",))] == ["uncached", "every-2"]


def test_the_rival_is_fewer_steps_in_the_same_time() -> None:
    """Between two numbers of steps its error is interpolated by time; a cache that is as good has ratio one."""
    solver = Solver("any", lambda seed, steps: torch.zeros(1), 4)
    target = Target("any", nn.Linear(1, 1), (solver,))
    times = {"uncached": 4.0, "fewer": 2.0, "cached": 3.0}
    values = {"uncached": 1.0, "fewer": 1.4, "cached": 1.1}
    found = [
        measure.Measured(rows.Row(kind, kind, solver, 4), seconds=[times[kind]], samples=[torch.tensor([values[kind]])])
        for kind in times
    ]
    measure._compare(target, found, [])
    assert found[2].rival_errors == pytest.approx([0.2])
    assert found[2].ratio == pytest.approx(0.5)
    said = report.verdict("any", found)
    assert said == ["any: nothing here reached 1.5x.", "any: nothing here reached 2.0x."]
    found[2].seconds = [1.9]
    measure._compare(target, found, [])
    assert "0.25 of the error of fewer steps" in report.verdict("any", found)[0]


def test_the_frechet_distance_is_that_of_gaussians() -> None:
    """Against the formula for covariances that commute, and zero to oneself."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3)) * [1.0, 2.0, 0.5]
    b = rng.normal(size=(4000, 3)) * [2.0, 1.0, 0.5] + [1.0, 0.0, -2.0]
    assert frechet.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet.frechet(a, b) == pytest.approx(5.0 + 1.0 + 1.0, rel=0.06)
    assert linalg.norm(np.cov(a, rowvar=False) - np.diag([1, 4, 0.25])) < 0.3


def test_realism_tells_samples_from_noise() -> None:
    realism = frechet.Realism()
    mean, spread = frechet.floor(realism, 100)
    noise = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert 0 < mean < 1 and 0 < spread < mean
    assert frechet.distance(realism, noise) > 10 * mean


def test_the_shipped_model_is_what_it_says() -> None:
    """Trained: it predicts the noise in a real-looking image far better than zero does."""
    model = fashion.load_model()
    samples = fashion.sample(model, fashion.ddim(), seed=5, steps=10, images=10)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    scheduler = fashion.ddim()
    t = torch.full((10,), 400)
    with torch.no_grad():
        predicted: Tensor = model(scheduler.add_noise(samples, noise, t), timestep=t, class_labels=(torch.arange(10) + 50) % 10)[0]
    assert (predicted - noise).square().mean() < 0.1
    assert len(cachekit.graph(model, samples, timestep=t, class_labels=torch.arange(10)).blocks) == 8
