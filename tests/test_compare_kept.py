"""Finished runs of a comparison on disk: what is taken from there, and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_compare_targets import small
from torch import Tensor

from cachekit.demo.compare import Entry, compare_all
from cachekit.demo.kept import Kept
from cachekit.demo.target import Target

QUIET = Console(quiet=True)
ROWS = ("every-2", "every-3@model")


def counted(target: Target) -> tuple[Target, list[int]]:
    """The same target, and the seeds that it was asked to sample."""
    (solver,), asked = target.solvers, list[int]()

    def sample(seed: int, steps: int) -> Tensor:
        asked.append(seed)
        return solver.sample(seed, steps)

    return replace(target, solvers=(replace(solver, sample=sample),)), asked


def run(target: Target, folder: Path, seeds: int, first: int = 0, rows: tuple[str, ...] = ROWS, also: str = "") -> Any:
    return compare_all([Entry(target, rows)], seeds, folder / "out", QUIET, first=first, kept=Kept(folder / "runs", also))[0]


def test_a_second_run_takes_everything_from_the_first(tmp_path: Path) -> None:
    """Times, samples, counts and records: what is written is the same to the last digit."""
    target, asked = counted(small(3))
    first = run(target, tmp_path, 2)
    per_seed = len(first["solvers"]["DDIM"]["rows"])
    assert len(asked) == 2 * per_seed
    assert run(target, tmp_path, 2) == first and len(asked) == 2 * per_seed
    assert any(row["recomputed"] and row["blocks_run"] for row in first["solvers"]["DDIM"]["rows"])


def test_halves_from_two_processes_are_one_whole(tmp_path: Path) -> None:
    target, asked = counted(small(3))
    for first in (0, 2):
        run(target, tmp_path, 2, first)
    apart = len(asked)
    whole = run(target, tmp_path, 4)
    assert len(asked) == apart
    alone = compare_all([Entry(small(3), ROWS)], 4, tmp_path / "alone", QUIET, first=0)[0]
    for kept, made in zip(whole["solvers"]["DDIM"]["rows"], alone["solvers"]["DDIM"]["rows"], strict=True):
        assert kept["errors"] == made["errors"] and kept["errors_to_fine"] == made["errors_to_fine"]
        assert kept["frechet"] == made["frechet"] and kept["blocks_run"] == made["blocks_run"]


def test_what_is_run_again(tmp_path: Path) -> None:
    """Other weights, another row, and other samples of a seed; a file that another process is writing is not read."""
    target, asked = counted(small(3))
    per_seed = len(run(target, tmp_path, 1)["solvers"]["DDIM"]["rows"])
    run(target, tmp_path, 1, rows=(*ROWS, "every-4"))
    assert len(asked) == per_seed + 1
    run(target, tmp_path, 1, also="20 a seed")
    assert len(asked) == 2 * per_seed + 1
    with torch.no_grad():
        next(target.model.parameters()).add_(1e-6)
    run(target, tmp_path, 1)
    assert len(asked) == 3 * per_seed + 1
    for file in (tmp_path / "runs").rglob("*.pt"):
        file.rename(file.with_suffix(".new"))
    run(target, tmp_path, 1)
    assert len(asked) == 4 * per_seed + 1


def test_nothing_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compare_all([Entry(small(2), ())], 1, tmp_path / "out", QUIET)
    assert not list(tmp_path.rglob("*.pt"))
