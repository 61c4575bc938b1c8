"""Every method by the spec string that it is known by: wrapped and sampled as it is written, on a model that it is meant for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import STEPS, sampling, small
from cases import Case
from running import generate
from zoo import DIT, FLUX, LATTE, PIXART, deeper

import cachekit
from cachekit.demo.fashion import ddim, load_model, sample
from cachekit.for_model import ForModel
from cachekit.policies import delta_dit
from cachekit.policies.magcache_published import shifted

TIMES = tuple(float(t) for t in range(980, 0, -40))
FINE = tuple(float(t) for t in range(980, 0, -10))


def shipped(spec: str) -> Any:
    """The shipped DiT in 25 steps of DDIM."""
    model = cachekit.wrap(load_model(), spec)
    sample(model, ddim(), 0, steps=25, images=1)
    return model


def guided(spec: str) -> Any:
    """The shipped DiT under guidance by separate, named passes; the unconditional one is of another class."""
    model = cachekit.wrap(load_model(), spec)
    scheduler = ddim()
    scheduler.set_timesteps(25)
    x = torch.randn(1, 1, 28, 28)
    with torch.no_grad(), model.cachekit.session(steps=25):
        for t in scheduler.timesteps:
            passes = []
            for name, label in (("cond", 7), ("uncond", 0)):
                with model.cachekit.branch(name):
                    passes.append(model(x, timestep=t.expand(1), class_labels=torch.tensor([label])).sample)
            x = scheduler.step(passes[1] + 1.5 * (passes[0] - passes[1]), t, x).prev_sample
    return model


def random(case: Case, times: tuple[float, ...] = TIMES) -> Callable[[str], Any]:
    """A small model of a family, with random weights."""

    def run(spec: str) -> Any:
        model = cachekit.wrap(case.build(), spec)
        with torch.no_grad(), model.cachekit.session(steps=len(times)), model.cachekit.branch("only"):
            generate(model, case, times)
        return model

    return run


# Where it is not the shipped one: attention over time, cross-attention, more than eight blocks, published numbers, guidance.
MEANT: dict[str, Callable[[str], Any]] = {
    "fora-3": shipped,
    "delta-dit-3": shipped,
    "pab": random(LATTE),
    "tgate-20-2": random(PIXART),
    "teacache-0.2": random(LATTE),
    "first-block-0.1": shipped,
    "dbcache-8-0-0.08": random(deeper(DIT, 12), FINE),
    "adacache": shipped,
    "magcache-0.06": random(FLUX, shifted(28, 1.15)),
    "easycache-0.025": shipped,
    "taylorseer-3-1": shipped,
    "hicache-3-2": shipped,
    "foca-3": shipped,
    "speca-0.3": shipped,
    "toca-3-0.07": shipped,
    "duca-3-0.05": shipped,
    "fastercache": guided,
}


def shares(model: Any) -> tuple[int, int]:
    """How many blocks and modules of all steps ran, and how many there were."""
    records = model.cachekit.stats.records
    ran = [flag for record in records for flag in (*record.recomputed, *(record.modules or ()))]
    return sum(map(bool, ran)), len(ran)


@pytest.mark.parametrize("spec", MEANT)
def test_it_reuses_as_it_is_written(spec: str) -> None:
    model = MEANT[spec](spec)
    ran, of = shares(model)
    assert 0 < ran < of, "some was reused, some recomputed"
    assert not model.cachekit.stats.notes, "nothing of it was off"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration and a plan of a small DiT."""
    folder, model = tmp_path_factory.mktemp("files"), small()
    calibration = cachekit.calibrate(model, sampling(model), runs=2, sites=("middle", "attn", "mlp"), probes=(1,), progress=False)
    calibration.save(folder / "c.json")
    front = cachekit.search(calibration, model, sampling(model), budget=4, sites=("middle",), tries=1, progress=False)
    front.best.save(folder / "plan.json")
    return folder


@pytest.mark.parametrize(
    "spec",
    [
        *("smoothcache-0.1:{}/c.json", "plan:{}/plan.json", "teacache-0.2:{}/c.json", "magcache-0.06:{}/c.json"),
        *("teacache-percentile-60:{}/c.json", "first-block-percentile-60:{}/c.json", "change-percentile-60:{}/c.json"),
    ],
)
def test_it_reuses_with_its_file(spec: str, files: Path) -> None:
    model = cachekit.wrap(small(), spec.format(files))
    with model.cachekit.session(steps=STEPS):
        sampling(model)(5)
    ran, of = shares(model)
    assert 0 < ran < of


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "smoothcache-0.1",
            r"needs a calibration: write smoothcache-0\.1:FILE with the file of cachekit\.calibrate\(\.\.\.\)\.save",
        ),
        ("change-percentile-30", r"needs a calibration: write change-percentile-30:FILE"),
        ("every-2 | plan", r"plan needs a file: write plan:FILE with the file of cachekit\.search\(\.\.\.\)\.best\.save"),
        ("teacache-0.2", r"write teacache-0\.2:FILE with the file of cachekit\.calibrate"),
        ("magcache-0.06", r"write magcache-0\.06:FILE with the file of cachekit\.calibrate"),
    ],
)
def test_what_lacks_a_file_is_told_how_to_write_it(spec: str, says: str) -> None:
    with pytest.raises(cachekit.ConfigError, match=says):
        cachekit.wrap(load_model(), spec)


def run_short(spec: str, depth: int) -> Any:
    return random(deeper(DIT, depth), TIMES[:4])(spec)


def test_a_probe_of_the_whole_stack_is_told_of() -> None:
    """Where it lies outside it raises; where it covers all there is everything runs, and stats say so."""
    for depth in (2, 7):
        with pytest.raises(cachekit.ConfigError, match=rf"stack of {depth} blocks; .*smaller probe, for example dbcache-2-0-0\.08"):
            run_short("dbcache-8-0-0.08", depth)
    for spec, depth in (("dbcache-8-0-0.08", 8), ("dbcache-3-2-0.08", 5)):
        model = run_short(spec, depth)
        (note,) = model.cachekit.stats.notes
        assert "all run" in note and "write a smaller probe, for example dbcache-2-0-0.08" in note
        assert shares(model) == (4 * depth, 4 * depth)
    with pytest.raises(cachekit.ConfigError, match=r"stack of 6 blocks; .*delta-dit-3 for half of them"):
        run_short("delta-dit-3-14", 6)


@pytest.mark.parametrize(("depth", "half"), [(2, 1), (5, 2), (8, 4), (28, 14), (33, 14)])
def test_delta_dit_takes_half_of_the_blocks(depth: int, half: int) -> None:
    case = deeper(DIT, depth)
    sites = cachekit.wrap(case.build(), "delta-dit-3").cachekit._engine.sites
    assert sites == cachekit.wrap(case.build(), f"delta-dit-3-{half}").cachekit._engine.sites
    assert [(site.segment.start, site.segment.stop) for site in sites] == [(0, half), (-half, None)]


def test_delta_dit_counts_units_and_needs_two() -> None:
    made = delta_dit(3)
    assert isinstance(made, ForModel)
    sites = cachekit.wrap(LATTE.build(), made).cachekit._engine.sites
    assert [(site.segment.start, site.segment.stop) for site in sites] == [(0, 2), (-2, None)], "ten blocks in five pairs"
    with pytest.raises(cachekit.ConfigError, match=r"has 1 blocks; write every-3"):
        cachekit.wrap(deeper(DIT, 1).build(), "delta-dit-3")
