"""The paper's explanation, measured: are models with long skip connections smoother, along a generation and under perturbation?

    python benchmarks/smoothness.py --plain plain --skips skip-dit --out FOLDER

Targets as for `cachekit compare`; the first solver of each samples, from the same noise. Two measures (arXiv 2411.17616):
how far each block's output moves from step to step (relative L2 and cosine; blocks x steps, a heat map for each model), and the
cosine of the prediction with that of weights theta + a d1 + b d2, where random directions have each parameter's own norm. Both
models predict on the same inputs there: those of the plain one's generation. Figures are means over noise or direction seeds,
with the standard deviation between seeds. Written to the folder: smoothness.json, dynamics.png, landscape.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from smoothness_measures import Call, Dynamics, Values, dynamics, landscape, recorded

import cachekit
from cachekit.demo.shipped import find_target
from cachekit.demo.target import Target

POINTS = 7  # of the landscape's grid in each direction; odd, so that the original stands in the middle


@dataclass(frozen=True)
class Smoothness:
    """What was measured of one model; lists have one entry for each seed, landscapes a list for each radius."""

    name: str
    dynamics: list[Dynamics]
    landscapes: dict[float, list[Values]]

    def per_seed(self, kind: str, blocks: slice = slice(None)) -> Values:
        """Mean over samples, steps and the chosen blocks of ``"change"`` or ``"cosine"``, shape (seeds,)."""
        return np.array([getattr(found, kind)[:, :, blocks].mean() for found in self.dynamics])

    def edge(self, radius: float) -> Values:
        """Mean cosine on the edge of the landscape's grid, shape (seeds,)."""
        outermost = np.ones((POINTS, POINTS), dtype=bool)
        outermost[1:-1, 1:-1] = False
        return np.array([found[outermost].mean() for found in self.landscapes[radius]])


def measure(name: str, target: Target, calls: Sequence[Call], args: argparse.Namespace) -> Smoothness:
    """Everything of one model, on noise seeds 0, 1, ... and as many direction seeds."""
    model, solver = cachekit.unwrap(target.model), target.solvers[0]
    found = [dynamics(model, lambda seed=seed: solver.run(seed, args.steps)) for seed in range(args.seeds)]
    grids = {radius: np.linspace(-radius, radius, POINTS).tolist() for radius in args.radius}
    landscapes = {radius: [landscape(model, calls, seed, grid) for seed in range(args.seeds)] for radius, grid in grids.items()}
    return Smoothness(name, found, landscapes)


def said(values: Values) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" if len(values) > 1 else f"{values.mean():.4f}"


def lines(models: Sequence[Smoothness]) -> list[str]:
    """The figures as a table in text."""
    depth = len(models[0].dynamics[0].blocks)
    halves = {"all blocks": slice(None), "early half": slice(0, depth // 2), "late half": slice(depth // 2, None)}
    made = [f"{'':48}" + "".join(f"{model.name[-22:]:>24}" for model in models)]
    for title, kind in (("relative change from step to step", "change"), ("cosine from step to step", "cosine")):
        for where, blocks in halves.items():
            made.append(f"{f'{title}, {where}':48}" + "".join(f"{said(model.per_seed(kind, blocks)):>24}" for model in models))
    for radius in models[0].landscapes:
        title = f"cosine, weights perturbed (edge, {radius:g})"
        made.append(f"{title:48}" + "".join(f"{said(model.edge(radius)):>24}" for model in models))
    return made


def draw_dynamics(models: Sequence[Smoothness], path: Path) -> None:
    """Heat maps of blocks x steps, on one scale for each measure."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(models), figsize=(5.5 * len(models), 7), squeeze=False, layout="constrained")
    for row, kind in zip(axes, ("change", "cosine"), strict=True):
        maps = [np.mean([getattr(found, kind).mean(0) for found in model.dynamics], axis=0).T for model in models]
        low, high = min(each.min() for each in maps), max(np.quantile(each, 0.99) for each in maps)
        for axis, model, each in zip(row, models, maps, strict=True):
            image = axis.imshow(each, vmin=low, vmax=high, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
            axis.set(title=f"{model.name}\n{kind}", xlabel="step", ylabel="block")
        figure.colorbar(image, ax=row)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_landscapes(models: Sequence[Smoothness], path: Path) -> None:
    """Mean cosine over the two directions, a row for each radius, on one scale."""
    from matplotlib import pyplot

    radii = list(models[0].landscapes)
    size = (5 * len(models), 4.2 * len(radii))
    figure, axes = pyplot.subplots(len(radii), len(models), figsize=size, squeeze=False, layout="constrained")
    for row, radius in zip(axes, radii, strict=True):
        means = [np.mean(model.landscapes[radius], axis=0) for model in models]
        ends, low = (-radius, radius, -radius, radius), min(each.min() for each in means)
        for axis, model, mean in zip(row, models, means, strict=True):
            image = axis.imshow(mean.T, vmin=low, vmax=1, extent=ends, origin="lower", cmap="viridis")
            axis.set(title=model.name, xlabel="a", ylabel="b")
        figure.colorbar(image, ax=row, label="cosine with the original prediction")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def as_json(model: Smoothness) -> dict[str, Any]:
    """Every figure: for each seed, the mean over samples of each block and step, and the whole landscape."""
    found = [{"change": each.change.mean(0).tolist(), "cosine": each.cosine.mean(0).tolist()} for each in model.dynamics]
    landscapes = {str(radius): [each.tolist() for each in values] for radius, values in model.landscapes.items()}
    return {"name": model.name, "blocks": model.dynamics[0].blocks, "dynamics": found, "landscapes": landscapes}


def main() -> None:
    matplotlib.use("Agg", force=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", required=True, help="target with the plain model: a name, NAME:FILE, or package.module:factory")
    parser.add_argument("--skips", required=True, help="target with the same and long skip connections")
    parser.add_argument("--images", type=int, default=8, help="images or clips of each seed, for shipped targets")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=4, help="calls of a generation on which predictions are compared")
    parser.add_argument(
        "--radius", type=float, nargs="+", default=[0.1, 1.0], help="largest a and b; 1 is a perturbation as large as the weights"
    )
    parser.add_argument("--out", type=Path, default=Path("smoothness"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    targets = [find_target(name, args.images) for name in (args.plain, args.skips)]
    first = targets[0]
    calls = recorded(cachekit.unwrap(first.model), lambda: first.solvers[0].run(0, args.steps), args.calls)
    models = [measure(name, target, calls, args) for name, target in zip((args.plain, args.skips), targets, strict=True)]
    print("\n".join(lines(models)))
    written = {"steps": args.steps, "seeds": args.seeds, "radius": args.radius, "calls": args.calls}
    (args.out / "smoothness.json").write_text(json.dumps({**written, "models": [as_json(model) for model in models]}, indent=1))
    draw_dynamics(models, args.out / "dynamics.png")
    draw_landscapes(models, args.out / "landscape.png")


if __name__ == "__main__":
    main()
