"""The Pareto picture of a comparison: what a row takes in time against what it costs in quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cachekit.demo.measure import Measured
from cachekit.demo.pictures import pyplot

KINDS = {"fewer": ("fewer steps", "0.35", "o"), "better": ("a better solver", "tab:green", "s")}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: indices, by rising time.

    Args:
        points: (time, cost), lower is better in both.

    Returns:
        Those than which none is as fast and as good, and better in one of the two; of equal ones the first.
    """
    kept: list[int] = []
    for k in sorted(range(len(points)), key=lambda k: (*points[k], k)):
        if not kept or points[k][1] < points[kept[-1]][1]:
            kept.append(k)
    return kept


def pareto(title: str, found: Sequence[Measured], path: Path) -> None:
    """Time against the error to the uncached samples and, where it was measured, against the Frechet distance.

    Fewer steps and better solvers are lines, each cached row a point of its own; a line joins those on the front of the cached.
    """
    plt = pyplot()
    costs: list[tuple[str, Callable[[Measured], float]]] = [
        ("relative error to the uncached samples", lambda each: float(np.mean(each.errors)))
    ]
    if all(each.distance is not None for each in found):
        costs.append(("Frechet distance to real data", lambda each: float(each.distance or 0.0)))
    figure, axes = plt.subplots(1, len(costs), figsize=(5.6 * len(costs) + 3.6, 5.2), squeeze=False, layout="constrained")
    for axis, (name, cost) in zip(axes[0], costs, strict=True):
        _draw(axis, found, cost)
        axis.set_xlabel("wall time of a run [s]")
        axis.set_ylabel(name)
        axis.grid(alpha=0.25, which="both")
    axes[0][0].set_yscale("log")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{title}: lower left is better", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, found: Sequence[Measured], cost: Callable[[Measured], float]) -> None:
    # The uncached row has no error to itself, and a logarithmic axis no place for it.
    axis.axvline(found[0].time, color="0.6", linestyle=":", label="uncached")
    if cost(found[0]) > 0:
        axis.axhline(cost(found[0]), color="0.6", linestyle=":")
    for kind, (label, colour, marker) in KINDS.items():
        rows = sorted((each for each in found if each.row.kind == kind), key=lambda each: each.time)
        if rows:
            axis.plot([each.time for each in rows], [cost(each) for each in rows], marker, ls="-", color=colour, ms=4, label=label)
    cached = [each for each in found if each.row.kind == "cached"]
    points = [(each.time, cost(each)) for each in cached]
    best = front(points)
    axis.plot([points[k][0] for k in best], [points[k][1] for k in best], color="tab:red", lw=1, label="best of the caches")
    markers, colours = "ov^<>spPX*Dd", pyplot().get_cmap("tab20").colors
    for k, (each, (x, y)) in enumerate(zip(cached, points, strict=True)):
        look = {"marker": markers[k % len(markers)], "color": colours[k % len(colours)]}
        axis.plot([x], [y], ls="", ms=8, mec="0.2", mew=0.4, label=each.row.label, zorder=3, **look)
