"""What was measured, as a table, as JSON and in words."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

import cachekit
from cachekit.demo.measure import Measured

# Speed-ups at which the best cache is named.
LEVELS = (1.5, 2.0)

# Of n real samples, for each kind of features: mean and standard deviation of the distance to all of them.
Floors = Mapping[str, tuple[float, float]]


def size(nbytes: int) -> str:
    """Bytes, readably."""
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.0f} KiB"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{np.mean(values):.4f}"


def table(solver: str, steps: int | None, found: Sequence[Measured], real: Floors, n: int, plain: Measured | None = None) -> Table:
    """One solver's rows.

    Args:
        solver, steps: of the uncached run.
        found: the uncached row first.
        real: mean and spread of the distance of n real samples, for each kind of features.
        n: number of samples in each row.
        plain: the uncached row of the model that speed-ups are given against as well.
    """
    made = Table(title=f"{solver}, {steps} steps" if steps else solver, caption=_caption(found, real, n), caption_justify="left")
    against = [] if plain is None else ["against plain"]
    columns = ["", "wall", "speed-up", *against, "blocks run", "held", "error to uncached", "of fewer steps'", "error to fine"]
    columns.append("Frechet")
    for k, column in enumerate(columns):
        made.add_column(column, justify="right" if k else "left", no_wrap=True)
    kind = "uncached"
    for each in found:
        if each.row.kind != kind:
            made.add_section()
            kind = each.row.kind
        made.add_row(
            each.row.label,
            f"{each.time:.2f} s",
            f"{found[0].time / each.time:.2f}x",
            *([] if plain is None else [f"{plain.time / each.time:.2f}x"]),
            f"{each.blocks_run} of {each.blocks_total}" if each.blocks_total else "all",
            size(each.bytes_peak) if kind == "cached" else "",
            "" if each is found[0] else spread(each.errors),
            f"{each.ratio:.2f}" if each.ratio is not None else "",
            spread(each.fine_errors),
            f"{each.distance:.2f}" if each.distance is not None else "",
        )
    return made


def _caption(found: Sequence[Measured], real: Floors, n: int) -> str:
    lines = [
        f"Wall: median of {len(found[0].seconds)} runs in turn. Errors: relative, mean ± standard deviation over the seeds.",
        "of fewer steps': the error over that of fewer steps of the same solver in the same wall time; below 1 the cache wins.",
    ]
    for mean, deviation in list(real.values())[:1]:
        lines.append(
            f"Frechet: of {n} samples' features to real images'; {n} real images themselves give {mean:.2f} ± {deviation:.2f}."
        )
    return "\n".join(lines)


def verdict(solver: str, found: Sequence[Measured]) -> list[str]:
    """What the table says, in sentences."""
    full = found[0].time
    cached = [each for each in found if each.row.kind == "cached" and each.ratio is not None]
    said = []
    for level in LEVELS:
        fast = [each for each in cached if full / each.time >= level]
        if fast:
            best = min(fast, key=lambda each: float(np.mean(each.errors)))
            ratio = best.ratio or 0.0
            said.append(
                f"{solver}, {level}x and faster: {best.row.label} is closest to the uncached samples, at {full / best.time:.2f}x: "
                f"{'only ' if ratio < 0.5 else ''}{ratio:.2f} of the error of fewer steps in the same time"
                + (", so fewer steps are the better choice." if ratio > 1 else ".")
            )
        elif cached:
            said.append(f"{solver}: nothing here reached {level}x.")
    return said + _against_better(solver, found)


def _against_better(solver: str, found: Sequence[Measured]) -> list[str]:
    better = [each for each in found if each.row.kind == "better" and each.fine_errors]
    cached = [each for each in found if each.row.kind == "cached" and each.fine_errors]
    if not better or not cached:
        return []
    near = min(better, key=_to_fine)
    beaten = [
        each for each in cached if any(rival.time <= 1.1 * each.time and _to_fine(rival) < _to_fine(each) for rival in better)
    ]
    if not beaten:
        return [f"No cache of {solver} here is further from the fine solution than an uncached run of a better solver in its time."]
    best = min(beaten, key=_to_fine)
    return [
        f"The solver matters more than the cache: {near.row.label}, uncached, lands at {_to_fine(near):.4f} from the fine solution "
        f"in {near.time:.2f} s. {len(beaten)} of {len(cached)} caches of {solver} are further from it than an uncached run of a "
        f"better solver that takes no longer; the best of them lands at {_to_fine(best):.4f} ({best.row.label}), since {solver} "
        f"itself is off by {_to_fine(found[0]):.4f}."
    ]


def _to_fine(each: Measured) -> float:
    return float(np.mean(each.fine_errors))


def as_json(found: Sequence[Measured], plain: Measured | None = None) -> list[dict[str, Any]]:
    """Every row with its numbers for each seed."""
    rows = []
    for each in found:
        rows.append(
            {
                "label": each.row.label,
                "kind": each.row.kind,
                "solver": each.row.solver.name,
                "steps": each.row.steps,
                "seconds": each.seconds,
                "speedup": found[0].time / each.time,
                **({} if plain is None else {"speedup_against_plain": plain.time / each.time}),
                "blocks_run": each.blocks_run,
                "blocks_total": each.blocks_total,
                "bytes_held": each.bytes_peak,
                "errors": each.errors,
                "errors_of_fewer_steps_in_the_same_time": each.rival_errors,
                "errors_to_fine": each.fine_errors,
                "frechet": each.distance,
                "quality": each.quality.as_json(),
                "recomputed": [list(record.recomputed) for record in each.records],
                "notes": each.notes,
            }
        )
    return rows


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "cachekit": cachekit.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
