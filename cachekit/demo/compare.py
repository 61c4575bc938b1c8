"""`cachekit compare`: run targets under several policies, and show what each costs and gains."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from cachekit.demo import report
from cachekit.demo.kept import Kept
from cachekit.demo.measure import Measured, measure
from cachekit.demo.rows import rows_for
from cachekit.demo.show import show
from cachekit.demo.target import Solver, Target
from cachekit.errors import ConfigError

# No default of the package was chosen on these.
FIRST_SEED = 2000


@dataclass(frozen=True)
class Entry:
    """A target of a comparison.

    Attributes:
        target: what to sample.
        policies: its rows, as ``POLICY[@SEGMENTS][/REUSE]``.
        name: in the names of files, where there are several targets.
        fewer: whether rows of fewer steps and of better solvers belong to it.
    """

    target: Target
    policies: tuple[str, ...]
    name: str = ""
    fewer: bool = True


def compare(target: Target, policies: Sequence[str], seeds: int, out: Path, console: Console) -> dict[str, Any]:
    """Run, print, and write ``compare.json`` and the pictures into a folder.

    Args:
        target: what to sample.
        policies: rows as ``POLICY[@SEGMENTS][/REUSE]``.
        seeds: number of noise seeds.
        out: folder, made where there is none.
        console: where progress and tables go.

    Returns:
        What ``compare.json`` holds.
    """
    (found,) = compare_all([Entry(target, tuple(policies))], seeds, out, console)
    return found


def compare_all(
    entries: Sequence[Entry],
    seeds: int,
    out: Path,
    console: Console,
    bases: Sequence[int] = (),
    fine: int | None = None,
    first: int = FIRST_SEED,
    kept: Kept | None = None,
) -> list[dict[str, Any]]:
    """As ``compare``, several targets side by side: all their rows take turns, so that times compare.

    Args:
        entries: the last one is the model that speed-ups are given against as well, where there are several.
        seeds, out, console: as in ``compare``.
        bases: numbers of steps of the full run; the first solver is then shown at each of them, and the others as rows only.
            None leaves every solver its own.
        fine: on how many seeds the fine solution is computed; None means all.
        first: the first noise seed; the others follow.
        kept: where finished runs are kept, and taken from.

    Returns:
        What ``compare.json`` holds for each target; with several it holds them as a list.

    Raises:
        ConfigError: targets that have no solver in common, or bases for a solver that takes no steps.
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = list(range(first, first + seeds))
    runs, kept = _runs(entries, bases), kept or Kept()
    with _progress(console) as progress:
        solutions = [_fine(entry.target, chosen[:fine], progress, kept) for entry in entries]
        found = [_measured(entries, solvers, chosen, solutions, progress, kept) for solvers in runs]
    if kept.taken:
        console.print(f"{kept.taken} runs were kept from before; wall times are those measured then.")
    written = []
    for k, entry in enumerate(entries):
        said: dict[str, Any] = {"target": entry.target.name, "seeds": chosen, "environment": report.environment(), "solvers": {}}
        for solvers, rows in zip(runs, found, strict=True):
            plain = rows[-1][0] if len(entries) > 1 else None
            key = f"{solvers[k].name}, {solvers[k].steps} steps" if bases else solvers[k].name
            title = f"{entry.target.name}: {solvers[k].name}" if entry.name else solvers[k].name
            name = re.sub(r"\W+", "-", f"{entry.name} {key}".lower()).strip("-")
            said["solvers"][key] = show(entry.target, title, name, solvers[k], rows[k], plain, out, console)
        written.append(said)
    (out / "compare.json").write_text(json.dumps(written if len(written) > 1 else written[0], indent=1))
    console.print(f"\nWritten to {out}: compare.json, " + ", ".join(sorted(path.name for path in out.glob("*.png"))))
    return written


def _runs(entries: Sequence[Entry], bases: Sequence[int]) -> list[tuple[Solver, ...]]:
    """For each table the solver of each target."""
    first = entries[0].target.solvers
    for entry in entries[1:]:
        names = [[solver.name for solver in each.target.solvers] for each in (entries[0], entry)]
        if names[0] != names[1]:
            raise ConfigError(f"targets with different solvers, {names[0]} and {names[1]}; compare them one by one")
    if not bases:
        return [tuple(entry.target.solvers[k] for entry in entries) for k in range(len(first))]
    if first[0].steps is None:
        raise ConfigError(f"{entries[0].target.name!r} samples without a number of steps; leave out --steps")
    return [tuple(replace(entry.target.solvers[0], steps=steps) for entry in entries) for steps in bases]


def _measured(
    entries: Sequence[Entry],
    solvers: Sequence[Solver],
    seeds: Sequence[int],
    fine: Sequence[list[Tensor]],
    progress: Progress,
    kept: Kept,
) -> list[list[Measured]]:
    """One table's rows, for each target."""
    tables = [
        (entry.target, rows_for(entry.target, solver, entry.policies, entry.fewer))
        for entry, solver in zip(entries, solvers, strict=True)
    ]
    task = progress.add_task(solvers[0].name, total=sum(len(rows) for _, rows in tables) * len(seeds), row="")
    return measure(tables, seeds, fine, lambda label: progress.update(task, advance=1, row=label), kept)


def _progress(console: Console) -> Progress:
    bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *bar, TextColumn("{task.fields[row]}"), console=console)


def _fine(target: Target, seeds: Sequence[int], progress: Progress, kept: Kept) -> list[Tensor]:
    fine = target.fine
    if fine is None:
        return []
    solved = []
    task = progress.add_task("fine solution", total=len(seeds), row="")
    with torch.inference_mode():
        for seed in seeds:
            solved.append(kept.solution(target, seed, functools.partial(fine, seed)).cpu())
            progress.advance(task)
    return solved
