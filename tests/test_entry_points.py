"""Policies and adapters of other packages: a real installed distribution brings both, and a fresh process finds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cachekit
from cachekit.adapter import adapter_for, installed_adapters
from cachekit.policies import every
from cachekit.spec import known_policies, parse_policy

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "someone-elses-caching"
version = "1.2"

[tool.setuptools]
py-modules = ["elses_caching"]

[project.entry-points."cachekit.policies"]
gap = "elses_caching:gap"
gentle-gap = "elses_caching:gentle"

[project.entry-points."cachekit.adapters"]
velocity = "elses_caching:VELOCITY"
more = "elses_caching:MORE"
"""
MODULE = '''
"""A policy, a preset and three adapters."""

import cachekit
from cachekit.policies import first
from pydantic import PositiveFloat
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class gap(cachekit.Policy[float]):
    """Recompute when t has fallen by at least so much since the last recompute."""

    width: PositiveFloat

    def init(self):
        return float("inf")

    def decide(self, state, step):
        return state - step.t >= self.width

    def update(self, state, step, recomputed):
        return step.t if recomputed else state


def gentle(width, warm_up=2):
    return cachekit.Preset(first(warm_up) | gap(width), segments="all", reuse="taylor-1")


VELOCITY = cachekit.Adapter(name="velocity", classes=("Velocity",), timestep="progress", range=1000, scale=1000, rising=True)
# One of its own for a class that cachekit knows too.
MORE = [cachekit.Adapter(name="my-dit", classes=("DiT",), range=500), cachekit.Adapter(name="nobody")]
'''
USE = """
import json

import torch
from torch import nn

import cachekit


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Velocity(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, progress):
        for block in self.blocks:
            x = block(x)
        return x


class Mine(Velocity):
    pass


class DiT(Velocity):
    pass


def refused(spec):
    try:
        cachekit.plan(spec, [])
    except cachekit.ConfigError as error:
        return str(error)


model = cachekit.wrap(Mine(), "gap-250 | first-2")
with torch.no_grad():
    for k in range(5):
        model(torch.ones(2, 3, 4) + 0.1 * torch.arange(4) * k, progress=torch.tensor(k / 5))
print(json.dumps({
    "by class": model.cachekit.adapter.name,
    "by name": cachekit.wrap(nn.Linear(1, 1), "every-1", adapter="velocity").cachekit.adapter.timestep,
    "theirs first": cachekit.wrap(DiT(), "every-1").cachekit.adapter.name,
    "records": [(round(record.t), record.recomputed) for record in model.cachekit.stats.records],
    "schedule": list(cachekit.plan("gap-250 | first-2", [1000, 800, 600, 400, 200])),
    "preset": list(cachekit.plan("gentle-gap-350-1", [1000, 800, 600, 400, 200])),
    "unknown": refused("gapp-2"),
    "refused": refused("gap-0"),
}))
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the other package."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (source / "elses_caching.py").write_text(MODULE, encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")
    subprocess.run([*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", target, source], check=True)
    return target


@pytest.fixture(scope="session")
def seen(installed: Path) -> Any:
    """What a process of its own finds."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", USE], env=env, cwd=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_policy_is_found_by_its_name(seen: dict[str, Any]) -> None:
    assert seen["schedule"] == [True, True, False, True, False]


def test_a_preset_with_two_numbers_and_a_name_of_two_words(seen: dict[str, Any]) -> None:
    assert seen["preset"] == [True, False, True, False, True]


def test_an_adapter_is_found_by_class_and_by_name(seen: dict[str, Any]) -> None:
    # Mine is a subclass of the class that the adapter names.
    assert seen["by class"] == "velocity"
    assert seen["by name"] == "progress"


def test_adapters_of_others_come_before_cachekits_own(seen: dict[str, Any]) -> None:
    assert seen["theirs first"] == "my-dit"


def test_both_work_on_a_model(seen: dict[str, Any]) -> None:
    full, part = [True] * 3, [True, False, True]
    assert seen["records"] == [[1000, full], [800, full], [600, part], [400, full], [200, part]]


def test_errors_know_them(seen: dict[str, Any]) -> None:
    assert "gap-WIDTH" in seen["unknown"]
    assert "gentle-gap-WIDTH-WARM_UP" in seen["unknown"]
    assert "every-N" in seen["unknown"]
    assert seen["refused"].startswith("'gap-0' does not fit gap-WIDTH")
    assert "greater than 0" in seen["refused"]


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(installed)
    yield
    sys.modules.pop("elses_caching", None)


def test_what_is_installed_later_is_found_too(on_path: None) -> None:
    assert {"gap", "gentle-gap"} <= known_policies().keys()
    names = [adapter.name for adapter in installed_adapters()]
    assert set(names[:3]) == {"velocity", "my-dit", "nobody"}
    assert "dit" in names[3:]
    preset = parse_policy("gentle-gap-100")
    assert (preset.segments, preset.reuse) == ("all", "taylor-1")


def test_without_it_nothing_is_left() -> None:
    assert "gap" not in known_policies()
    assert "velocity" not in {adapter.name for adapter in installed_adapters()}
    with pytest.raises(cachekit.ConfigError, match=r"no adapter is called 'velocity'; known: .*dit"):
        adapter_for(object(), "velocity")


BROKEN = """
[cachekit.policies]
broken = nowhere_to_be_found:policy

[cachekit.adapters]
broken = nowhere_to_be_found:ADAPTER
"""


def test_a_broken_package_is_named_and_breaks_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken_caching-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-caching\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(BROKEN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert parse_policy("every-2").policy == every(2)
    with pytest.warns(UserWarning, match="broken.*nowhere_to_be_found"):
        assert adapter_for(object()).name == "automatic"
    with pytest.raises(cachekit.ConfigError, match="nowhere_to_be_found"):
        parse_policy("broken-2")
