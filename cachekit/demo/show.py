"""One table of a comparison: printed, said in words, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from cachekit.demo import pictures, report
from cachekit.demo.frechet import floor
from cachekit.demo.measure import Measured
from cachekit.demo.pareto import pareto
from cachekit.demo.report_quality import quality_table
from cachekit.demo.target import Solver, Target


def show(
    target: Target,
    title: str,
    name: str,
    solver: Solver,
    found: list[Measured],
    plain: Measured | None,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Print one table and what it says, and draw its pictures.

    Args:
        target: whose rows they are.
        title: of the table.
        name: of the pictures' files.
        solver: of the uncached run.
        found: the rows, the uncached one first.
        plain: the uncached row of the model that speed-ups are given against as well.
        out: folder of the pictures.
        console: where to print.

    Returns:
        What ``compare.json`` holds of it.
    """
    n = sum(len(samples) for samples in found[0].samples)
    real = {kind.name: floor(kind, n) for kind in target.real}
    said = report.verdict(solver.name, found)
    console.print()
    console.print(report.table(title, solver.steps, found, real, n, plain))
    if any(each.quality.frechet or each.quality.ssim for each in found):
        console.print(quality_table(title, found, real, n, plain))
    for sentence in said:
        console.print(f"  {sentence}", highlight=False)
    for note in sorted({f"{each.row.label}: {note}" for each in found for note in each.notes}):
        console.print(f"  note, {note}", highlight=False)
    steps = f", {solver.steps} steps" if solver.steps else ""
    pictures.sample_grid(
        target, f"{target.name}: {solver.name}{steps}, the same noise in each row", found, out / f"samples-{name}.png"
    )
    pictures.block_map(f"{solver.name}{steps}", found, out / f"map-{name}.png")
    pareto(f"{target.name}: {solver.name}{steps}", found, out / f"pareto-{name}.png")
    rows = report.as_json(found, plain)
    return {
        "steps": solver.steps,
        "samples": n,
        "real": {name: list(each) for name, each in real.items()},
        "verdict": said,
        "rows": rows,
    }
