"""How often ``ErrorBudget`` keeps its promise: the final error of the shipped model's samples, over seeds, solvers and budgets.

    python benchmarks/error_budget.py                          # the figures of docs/error-budget.md; half an hour on one core
    python benchmarks/error_budget.py --first 0 --seeds 5      # the seeds that the margins were chosen on

The amplification is measured on seed 0, which is none of the default ones. Errors are relative to the uncached sample of the
same seed, over all its images; a step counts as reused where any block was left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cachekit
from cachekit import Forecast
from cachekit.demo import fashion
from cachekit.demo.measure import relative_error
from cachekit.policies import ErrorBudget

BUDGETS = (0.01, 0.02, 0.05)
SOLVERS: tuple[tuple[str, Callable[[], Any], int], ...] = (
    ("DDIM", fashion.ddim, 50),
    ("DPM-Solver++(2M)", fashion.dpm_solver, 30),
)


@dataclass(frozen=True)
class Variant:
    name: str
    segments: str
    reuse: Any
    margin: float


VARIANTS = (
    Variant("forecast", "model", Forecast(order=2, axis="grid"), 1.25),
    Variant("forecast, margin 0.7", "model", Forecast(order=2, axis="grid"), 0.7),
    Variant("held", "model", "output", 1.25),
    Variant("forecast", "middle", Forecast(order=2, axis="grid"), 1.25),
    Variant("forecast, margin 0.7", "middle", Forecast(order=2, axis="grid"), 0.7),
    Variant("Hermite", "skip-1", "hermite-2", 1.25),
)


def report(model: Any, solver: str, scheduler: Any, steps: int, seeds: Sequence[int], images: int) -> None:
    """Print, for every variant and budget, how many runs stayed under it and what share of the steps they reused."""
    cachekit.unwrap(model)
    full: list[Tensor] = [fashion.sample(model, scheduler, seed, steps, images) for seed in seeds]
    measured: dict[str, cachekit.Amplification] = {}
    for variant in VARIANTS:
        cachekit.unwrap(model)
        if variant.segments not in measured:
            measured[variant.segments] = cachekit.measure_amplification(
                model, lambda: fashion.sample(model, scheduler, 0, steps, images), segments=variant.segments
            )
            found = measured[variant.segments]
            pairs = ", ".join(f"{t:.0f}: {a:.1f}" for t, a in zip(found.timesteps, found.factors, strict=True))
            print(f"{solver}, {variant.segments}: a(t) = {pairs}", flush=True)
        for eps in BUDGETS:
            policy = ErrorBudget(eps, amplification=measured[variant.segments], margin=variant.margin)
            cachekit.wrap(model, policy, segments=variant.segments, reuse=variant.reuse)
            errors, shares = [], []
            for seed, true in zip(seeds, full, strict=True):
                errors.append(relative_error(fashion.sample(model, scheduler, seed, steps, images), true))
                shares.append(float(np.mean([not all(record.recomputed) for record in model.cachekit.stats.records])))
            under = sum(error <= eps for error in errors)
            print(
                f"| {solver} | {variant.segments} | {variant.name} | {eps:.0%} | {under} of {len(errors)} | "
                f"{np.mean(errors):.2%} | {max(errors):.2%} | {np.mean(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=3000, help="first seed")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--images", type=int, default=4, help="per seed")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    model = fashion.load_model()
    torch.set_num_threads(1)
    for solver, scheduler, steps in SOLVERS:
        report(model, solver, scheduler(), steps, seeds, args.images)


if __name__ == "__main__":
    main()
