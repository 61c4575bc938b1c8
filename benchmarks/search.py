"""Searched plans against every fixed schedule with as many full steps, on a shipped model and on seeds that search has not seen.

    python benchmarks/search.py --out search.json        # some hours on two cores, nearly all of them for DDIM-50
    python benchmarks/search.py --out skips.json --target skip-dit --solvers DDIM-20 --sites model --seeds 24
    python benchmarks/search.py --out clips.json --target video --solvers DDIM-20 --sites model --each 1 --seeds-a-run 8 --runs 3

For each solver and site it runs all fixed schedules (``FIXED``), then searches a plan for each number of full steps at which any of
them stood, and runs that on the same seeds. What was found is written to ``--out`` as it comes; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from defaults import variants
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import cachekit
from cachekit.calibrate import calibrate
from cachekit.demo.measure import relative_error
from cachekit.demo.shipped import find_target
from cachekit.search import search

SITES = ("model", "middle")
SOLVERS = {"DDIM-50": ("DDIM", 50), "DDIM-20": ("DDIM", 20), "DPM-Solver++(2M)-30": ("DPM-Solver++(2M)", 30)}
REUSES = ("output", "grid-taylor-1", "grid-taylor-2")
PRESETS = ("taylorseer", "hicache", "foca")


@dataclass(frozen=True)
class Fixed:
    name: str
    policy: Any
    reuse: Any


def fixed() -> Iterator[Fixed]:
    """Schedules that look at nothing but time."""
    for n in (2, 3, 4):
        for variant in variants(n):
            yield Fixed(f"{variant.name}, period {n}", variant.policy, variant.reuse)
    for n in (2, 3, 4, 5):
        for reuse in REUSES:
            yield Fixed(f"every-{n} {reuse}", f"every-{n}", reuse)
        for order in (1, 2):
            yield Fixed(f"taylorseer-{n}-{order}", f"taylorseer-{n}-{order}", None)
        yield Fixed(f"hicache-{n}-2", f"hicache-{n}-2", None)
        yield Fixed(f"foca-{n}", f"foca-{n}", None)
    for n in (2, 3):
        for reuse in REUSES:
            yield Fixed(f"N{n}-700-50 {reuse}", f"N{n}-700-50", reuse)


class Bench:
    """One solver on one model: measured errors."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        solver, self.steps = SOLVERS[name]
        self.each, self.seeds_a_run = args.each, args.seeds_a_run
        target = find_target(args.target, self.each)
        self.model = target.model
        self.solver = next(known for known in target.solvers if known.name == solver)
        self.seeds = range(args.first_seed, args.first_seed + args.seeds)
        self._full: Tensor | None = None

    def sample(self, seeds: range) -> Tensor:
        """Samples of several seeds in one batch."""
        return self.solver.sample(seeds, self.steps)

    def run(self, policy: Any, segments: Any, reuse: Any) -> tuple[tuple[bool, ...], Tensor]:
        """Which steps were full, and the report seeds' samples."""
        cachekit.wrap(self.model, policy, segments=segments, reuse=reuse)
        found = self.sample(self.seeds)
        full = tuple(all(record.recomputed) for record in self.model.cachekit.stats.records[-self.steps :])
        cachekit.unwrap(self.model)
        return full, found

    def errors(self, found: Tensor) -> list[float]:
        """The relative error of each seed."""
        if self._full is None:
            self._full = self.run("every-1", "model", None)[1]
        pairs = zip(found.split(self.each), self._full.split(self.each), strict=True)
        return [relative_error(a, b) for a, b in pairs]

    def fixed(self, site: str) -> list[dict[str, Any]]:
        """Every fixed schedule; of those that do the same, the first one."""
        rows: list[dict[str, Any]] = []
        for each in fixed():
            full, found = self.run(each.policy, site, each.reuse)
            row = {"name": each.name, "full": sum(full), "errors": self.errors(found)}
            if not any(other["full"] == row["full"] and other["errors"] == row["errors"] for other in rows):
                rows.append({**row, "recompute": [i for i, ran in enumerate(full) if ran]})
        return rows

    def calibration(self, sites: list[str]) -> Any:
        return calibrate(self.model, self.numbered, runs=2, sites=sites)

    def numbered(self, run: int) -> Tensor:
        return self.sample(range(run * self.seeds_a_run, (run + 1) * self.seeds_a_run))

    def searched(self, calibration: Any, site: str, full: int, args: argparse.Namespace) -> dict[str, Any]:
        front = search(calibration, self.model, self.numbered, budget=full, sites=[site], tries=args.tries, runs=range(args.runs))
        plan = front.best
        ran, found = self.run(plan, None, None)
        return {
            "full": sum(ran),
            "errors": self.errors(found),
            "recompute": list(plan.recompute),
            "reuse": plan.reuse.model_dump(),
            "calibration error": plan.error,
            "generations": front.generations,
        }


class Kept:
    """A JSON file of results by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, key: str, make: Any) -> Any:
        if key not in self.values:
            self.values[key] = make()
            self.path.write_text(json.dumps(self.values))
        return self.values[key]


def spread(errors: list[float]) -> str:
    """Mean and standard deviation, to the digits that the latter allows."""
    digits = 5 if np.mean(errors) < 0.003 else 4
    return f"{np.mean(errors):.{digits}f} ± {np.std(errors, ddof=1):.{digits}f}"


def report(name: str, site: str, rows: list[dict[str, Any]], plans: dict[int, dict[str, Any]]) -> None:
    """Each number of full steps with the fixed schedule of least mean error on these seeds, as in docs/plans-measured.md."""
    made = Table(box=box.MARKDOWN)
    for column in ("full steps", "plan", "best fixed schedule", "its name", "of its error", "better on"):
        made.add_column(column, no_wrap=True)
    for full, plan in sorted(plans.items()):
        best = min((row for row in rows if row["full"] == full), key=lambda row: np.mean(row["errors"]))
        wins = sum(a < b for a, b in zip(plan["errors"], best["errors"], strict=True))
        ratio = np.mean(plan["errors"]) / np.mean(best["errors"])
        seeds = len(best["errors"])
        made.add_row(str(full), spread(plan["errors"]), spread(best["errors"]), best["name"], f"{ratio:.2f}", f"{wins} of {seeds}")
    console = Console(width=200)
    console.print(f"\n**{name}, {site}**\n", made, sep="\n")


def run(name: str, args: argparse.Namespace) -> None:
    """Everything of one solver."""
    bench = Bench(name, args)
    kept = Kept(args.out.with_name(f"{args.out.stem}-{name}.json"))
    rows = {site: kept.get(f"fixed {site}", functools.partial(bench.fixed, site)) for site in args.sites}
    file = args.out.with_name(f"{args.out.stem}-{name}-calibration.json")
    if not file.exists():
        bench.calibration(args.sites).save(file)
    calibration = cachekit.Calibration.load(file)
    for site in args.sites:
        plans = {}
        stood = {row["full"] for row in rows[site]} - {bench.steps}
        for full in sorted(stood) if args.full is None else [full for full in args.full if full in stood]:
            plans[full] = kept.get(f"plan {site} {full}", functools.partial(bench.searched, calibration, site, full, args))
        report(name, site, rows[site], plans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    parser.add_argument("--target", default="plain", help="one of `cachekit compare`: plain, skip-dit, retrofit, control, video")
    parser.add_argument("--solvers", nargs="*", default=list(SOLVERS))
    parser.add_argument("--sites", nargs="*", default=list(SITES))
    parser.add_argument("--full", nargs="*", type=int, help="numbers of full steps, in this order; all by default")
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--first-seed", type=int, default=2000, help="of those that errors are reported on")
    parser.add_argument("--seeds", type=int, default=6, help="how many these are")
    parser.add_argument("--each", type=int, default=4, help="images or clips of a seed")
    parser.add_argument(
        "--seeds-a-run", type=int, default=4, help="in one batch, of the calibration's two runs and of those of --runs"
    )
    parser.add_argument("--runs", type=int, default=6, help="runs, 0 and on, that candidates are compared on")
    args = parser.parse_args()
    for name in args.solvers:
        run(name, args)


if __name__ == "__main__":
    main()
