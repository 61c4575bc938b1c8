"""`cachekit compare`: run a target under several policies, and show what each costs and gains."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from cachekit.demo import pictures, report
from cachekit.demo.measure import Measured, measure
from cachekit.demo.pareto import pareto
from cachekit.demo.rows import rows_for
from cachekit.demo.target import Solver, Target

# No default of the package was chosen on these.
FIRST_SEED = 2000


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
    out.mkdir(parents=True, exist_ok=True)
    chosen = list(range(FIRST_SEED, FIRST_SEED + seeds))
    tables = {solver: rows_for(target, solver, tuple(policies)) for solver in target.solvers}
    found: dict[Solver, list[Measured]] = {}
    with _progress(console) as progress:
        fine = _fine(target, chosen, progress)
        for solver, rows in tables.items():
            task = progress.add_task(solver.name, total=len(rows) * len(chosen), row="")

            def tick(label: str, task: Any = task) -> None:
                progress.update(task, advance=1, row=label)

            found[solver] = measure(target, rows, chosen, fine, tick)
    written: dict[str, Any] = {"target": target.name, "seeds": chosen, "environment": report.environment(), "solvers": {}}
    for solver, measured in found.items():
        written["solvers"][solver.name] = _show(target, solver, measured, out, console)
    (out / "compare.json").write_text(json.dumps(written, indent=1))
    console.print(f"\nWritten to {out}: compare.json, " + ", ".join(sorted(path.name for path in out.glob("*.png"))))
    return written


def _progress(console: Console) -> Progress:
    bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *bar, TextColumn("{task.fields[row]}"), console=console)


def _fine(target: Target, seeds: Sequence[int], progress: Progress) -> list[Tensor]:
    if target.fine is None:
        return []
    solved = []
    task = progress.add_task("fine solution", total=len(seeds), row="")
    with torch.inference_mode():
        for seed in seeds:
            solved.append(target.fine(seed).cpu())
            progress.advance(task)
    return solved


def _show(target: Target, solver: Solver, found: list[Measured], out: Path, console: Console) -> dict[str, Any]:
    n = sum(len(samples) for samples in found[0].samples)
    real = target.floor(n) if target.floor is not None else None
    said = report.verdict(solver.name, found)
    console.print()
    console.print(report.table(solver.name, solver.steps, found, real, n))
    for sentence in said:
        console.print(f"  {sentence}", highlight=False)
    for note in sorted({f"{each.row.label}: {note}" for each in found for note in each.notes}):
        console.print(f"  note, {note}", highlight=False)
    name = re.sub(r"\W+", "-", solver.name.lower()).strip("-")
    steps = f", {solver.steps} steps" if solver.steps else ""
    pictures.sample_grid(
        target, f"{target.name}: {solver.name}{steps}, the same noise in each row", found, out / f"samples-{name}.png"
    )
    pictures.block_map(f"{solver.name}{steps}", found, out / f"map-{name}.png")
    pareto(f"{target.name}: {solver.name}{steps}", found, out / f"pareto-{name}.png")
    return {"steps": solver.steps, "samples": n, "real": real, "verdict": said, "rows": report.as_json(found)}
