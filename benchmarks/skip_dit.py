"""The paper's claim (Skip-DiT, arXiv 2411.17616) on the shipped models: docs/skip-dit.md is made of what this prints.

    python benchmarks/skip_dit.py sample --keep runs/claim                    # hours; stops and goes on wherever it was
    python benchmarks/skip_dit.py sample --keep runs/claim --first-seed 2050  # the same from another end, beside it
    python benchmarks/skip_dit.py time --times runs/times                     # minutes, on an idle machine
    python benchmarks/skip_dit.py table --keep runs/claim --times runs/times --out runs/table
    python benchmarks/skip_dit.py alike --keep runs/claim --out runs/table    # models side by side: no times, errors and distances

Samples are many and their times were measured whenever, so that quality comes from the first and speed-ups from the second, where
all rows of all models take turns in one process. ``--kind video`` does the same for the clips.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cachekit.demo.compare import FIRST_SEED, Entry, compare_all
from cachekit.demo.kept import Kept
from cachekit.demo.shipped import find_target

PERIODS = (2, 3, 4, 5, 6)
# The paper's windows, class-to-image and class-to-video, and half of the blocks, or of Latte's pairs of them.
FORMAT = {"image": {"window": "1000-20", "half": 4}, "video": {"window": "900-50", "half": 3}}
# The same schedules on every model: held as in the paper, and forecast.
SHARED = (
    *(f"N{n}-{{window}}@skip-1{how}" for how in ("", "/taylor-1") for n in PERIODS),
    *(f"N{n}-{{window}}@skip-1/taylor-2" for n in (2, 3)),
)
WHOLE = tuple(f"skip-every-{n}@model" for n in (2, 3, 4))
MODULES = ("taylorseer-2-1@modules", "taylorseer-3-1@modules")
PLAIN = (
    "fora-2",
    "fora-3",
    "delta-dit-3-{half}",
    "first-block-0.05",
    "first-block-0.1",
    "skip-every-2",
    "skip-every-3",
    "skip-every-4",
)
SKIP = (
    "N2-700-50@skip-1",
    "N3-700-50@skip-1",
    "skip-every-2@skip-1",
    "skip-every-3@skip-1",
    "skip-every-4@skip-1",
    "skip-every-2@skip-2",
)
FEW = ("N2-{window}@skip-1", "N2-{window}@skip-1/taylor-1", "N3-{window}@skip-1/taylor-1")
# The last one is the model that speed-ups are given against as well.
MODELS = {
    "image": {
        "skip-dit": (*SHARED, *SKIP, *MODULES, *WHOLE),
        "retrofit": FEW,
        "control": FEW,
        "plain": (*SHARED, *PLAIN, *MODULES, *WHOLE),
    },
    "video": {"video-skip": (*SHARED, *SKIP, *MODULES, *WHOLE), "video": (*SHARED, *PLAIN, *MODULES, *WHOLE)},
}
BASES = (50, 20)
# Of the paper's promise, against the same model uncached.
LEVELS = (1.5, 2.2, 3.0)
# FID at the speed-up of DiT-XL/2, 250 steps, guidance 1.5; FVD on UCF-101 and the other three sets of Latte, all the authors' own.
PAPER = {
    ("plain", "uncached"): "2.30",
    ("plain", "fora-2"): "2.45 at 1.57x",
    ("plain", "delta-dit-3-4"): "2.47 at 1.45x",
    ("skip-dit", "uncached"): "2.29",
    ("skip-dit", "N2-1000-20@skip-1"): "2.31 at 1.46x",
    ("skip-dit", "N3-1000-20@skip-1"): "2.40 at 1.73x",
    ("skip-dit", "N4-1000-20@skip-1"): "2.54 at 1.93x",
    ("video", "uncached"): "155.2 / 28.9 / 49.5 / 166.8",
    ("video", "fora-2"): "160.5 / 27.2 / 52.9 / 198.6 at 1.10x",
    ("video", "delta-dit-3-3"): "161.6 / 25.8 / 51.7 / 188.4 at 1.22x",
    ("video-skip", "uncached"): "141.3 / 20.6 / 49.2 / 163.0",
    ("video-skip", "N2-900-50@skip-1"): "141.4 / 23.6 / 51.1 / 167.5 at 1.56x",
    ("video-skip", "N3-900-50@skip-1"): "138.0 / 26.8 / 54.2 / 179.4 at 1.91x",
    ("video-skip", "N4-900-50@skip-1"): "143.0 / 30.2 / 57.4 / 188.4 at 2.19x",
    ("video-skip", "N6-900-50@skip-1"): "151.8 / 42.4 / 69.0 / 208.0 at 2.43x",
}


def entries(args: argparse.Namespace) -> list[Entry]:
    """The models with their rows; ``--models`` and ``--rows`` choose some, and other weights are ``NAME:FILE``."""
    known = MODELS[args.kind]
    found = []
    for where in args.models or known:
        name = where.partition(":")[0]
        rows = tuple(args.rows or (row.format(**FORMAT[args.kind]) for row in known[name]))
        found.append(Entry(find_target(where, args.each), rows, name))
    return found


def run(args: argparse.Namespace, seeds: int, out: Path, kept: Kept) -> list[dict[str, Any]]:
    return compare_all(entries(args), seeds, out, Console(), args.bases, args.fine, args.first_seed, kept)


def cell(found: dict[str, float | None] | None, digits: int, percent: bool = False) -> str:
    """A figure with the ends of its interval."""
    if not found or found["value"] is None:
        return ""
    scale, sign = (100, "+") if percent else (1, "")
    ends = [found[key] for key in ("low", "high")]
    said = f"{scale * found['value']:{sign}.{digits}f}" + (" %" if percent else "")
    return said if None in ends else f"{said} [{', '.join(f'{scale * float(end or 0):{sign}.{digits}f}' for end in ends)}]"


def markdown(name: str, solver: dict[str, Any], times: dict[str, tuple[float, float]]) -> Table:
    """One model's rows at one base.

    Args:
        name: of the model.
        solver: what ``compare.json`` holds.
        times: for each label the speed-up against the same model and against the plain one.
    """
    kinds = list(solver["rows"][0]["quality"]["frechet"])
    made = Table(box=box.MARKDOWN)
    distances = [column for kind in kinds for column in (f"Frechet, {kind}", "to uncached")]
    for column in ("", "speed-up", "against plain", "blocks", "held", *distances, "error", "PSNR", "SSIM", "paper"):
        made.add_column(column, no_wrap=True)
    for row in solver["rows"]:
        quality, cached = row["quality"], row["kind"] == "cached"
        speeds = times.get(row["label"])
        made.add_row(
            f"`{row['label']}`" if cached else row["label"],
            *((f"{speed:.2f}x" for speed in speeds) if speeds else ("", "")),
            f"{row['blocks_run'] / row['blocks_total']:.2f}"
            if row["blocks_total"]
            else "1.00"
            if row["kind"] == "uncached"
            else "",
            f"{row['bytes_held'] / 2**10:.0f} KiB" if cached else "",
            *(
                text
                for kind in kinds
                for text in (cell(quality["frechet"][kind], 3), cell(quality["frechet_to_uncached"].get(kind), 1, percent=True))
            ),
            "" if row["kind"] == "uncached" else f"{np.mean(row['errors']):.4f}",
            cell(quality["psnr"], 1),
            cell(quality["ssim"], 3),
            PAPER.get((name, row["label"]), ""),
        )
    return made


def family(name: str, row: dict[str, Any]) -> str:
    """What a row is an example of."""
    label, skips = row["label"], "skip" in name or name == "retrofit"
    if row["kind"] != "cached":
        return {"uncached": "", "fewer": f"{name}, fewer steps", "better": f"{name}, DPM-Solver++(2M)"}[row["kind"]]
    if "@model" in label:
        return f"{name}, whole prediction forecast"
    if not skips:
        return f"{name}, any cache of blocks or modules"
    held = label.startswith("N") and "/" not in label
    return f"{name}, modules forecast" if "@modules" in label else f"{name}, Skip-Cache {'held' if held else 'forecast'}"


def levels(found: list[dict[str, Any]], timed: list[dict[str, Any]], names: list[str], base: str) -> Table:
    """The best of each family at each speed-up against the same model: its distances over those of the first model uncached."""
    made = Table(box=box.MARKDOWN)
    for column in ("", *(f"{level}x and faster" for level in LEVELS)):
        made.add_column(column, no_wrap=True)
    first = found[0]["solvers"][base]["rows"][0]["quality"]["frechet"]
    best: dict[str, dict[float, tuple[float, str]]] = {}
    for name, each, clock in zip(names, found, timed, strict=True):
        speeds = {row["label"]: row["speedup"] for row in clock["solvers"][base]["rows"]}
        for row in each["solvers"][base]["rows"]:
            ratios = [kind["value"] / first[key]["value"] - 1 for key, kind in row["quality"]["frechet"].items()]
            said = f"{' / '.join(f'{100 * ratio:+.1f}' for ratio in ratios)} % at {speeds[row['label']]:.2f}x: {row['label']}"
            for level in LEVELS if family(name, row) else ():
                if speeds[row["label"]] >= level:
                    kept = best.setdefault(family(name, row), {})
                    kept[level] = min(kept.get(level, (math.inf, "")), (ratios[0], said))
    for kind, cells in best.items():
        made.add_row(kind, *(cells.get(level, (0.0, ""))[1] for level in LEVELS))
    return made


def tables(found: list[dict[str, Any]], timed: list[dict[str, Any]], names: list[str]) -> None:
    console = Console(width=400)
    for base in found[0]["solvers"]:
        console.print(f"\n**{base}: the best at each speed-up**\n", markup=False, highlight=False)
        console.print(levels(found, timed, names, base), markup=False, highlight=False)
    for name, each, clock in zip(names, found, timed, strict=True):
        for base, solver in each["solvers"].items():
            rows = clock["solvers"][base]["rows"]
            times = {row["label"]: (row["speedup"], row.get("speedup_against_plain", row["speedup"])) for row in rows}
            console.print(f"\n**{name}, {base}** ({solver['samples']} samples)\n", markup=False, highlight=False)
            console.print(markdown(name, solver, times), markup=False, highlight=False)


def alike(found: list[dict[str, Any]], names: list[str], base: str) -> Table:
    """Every model's errors, and changes of the distances, of the rows that all of them have."""
    made = Table(box=box.MARKDOWN)
    made.add_column("", no_wrap=True)
    rows = [{row["label"]: row for row in each["solvers"][base]["rows"]} for each in found]
    for name in names:
        for column in ("error", "Frechet"):
            made.add_column(f"{name}: {column}", no_wrap=True)
    for label in [label for label in rows[0] if all(label in each for each in rows)]:
        cells = []
        for each in rows:
            quality, uncached = each[label]["quality"], each[label]["kind"] == "uncached"
            changes = [100 * change["value"] for change in quality["frechet_to_uncached"].values()]
            distances = [kind["value"] for kind in quality["frechet"].values()]
            cells.append("" if uncached else f"{np.mean(each[label]['errors']):.4f}")
            cells.append(" / ".join(f"{d:.3g}" for d in distances) if uncached else " / ".join(f"{c:+.1f}" for c in changes) + " %")
        made.add_row(f"`{label}`" if rows[0][label]["kind"] == "cached" else label, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sample", "time", "table", "alike"))
    parser.add_argument("--kind", choices=tuple(MODELS), default="image")
    parser.add_argument("--models", nargs="*", help="some of them, in this order, with other weights as NAME:FILE")
    parser.add_argument("--rows", nargs="*", help="these caches alone, for every model")
    parser.add_argument("--bases", nargs="*", type=int, default=BASES)
    parser.add_argument("--each", type=int, default=20, help="samples of a noise seed")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--fine", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/claim"))
    parser.add_argument("--times", type=Path, default=Path("runs/times"))
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    args = parser.parse_args()
    if args.what == "time":
        run(args, args.seeds, args.times, Kept())
        return
    found = run(args, args.seeds, args.out, Kept(args.keep, f"{args.each} a seed"))
    if args.what == "table":
        timed = json.loads((args.times / "compare.json").read_text())
        tables(found, timed, [entry.name for entry in entries(args)])
    if args.what == "alike":
        names = [Path(where.partition(":")[2] or where).stem for where in args.models or MODELS[args.kind]]
        for base in found[0]["solvers"]:
            Console(width=400).print(f"\n**{base}**\n", alike(found, names, base), sep="\n", markup=False, highlight=False)


if __name__ == "__main__":
    main()
