"""What the preset's parts are worth: the shipped model under variations of ``skip-every-N``, on seeds that chose the defaults.

    python benchmarks/defaults.py            # about three minutes on two cores

The seeds are not those of ``cachekit compare``. Errors are relative to the uncached samples, mean over the seeds; the price is the
share of the steps that are run in full.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cachekit
from cachekit import Forecast, Policy
from cachekit.demo import fashion
from cachekit.demo.measure import relative_error
from cachekit.policies import at_most, every, first, moved, tail

GRID = Forecast(order=2, axis="grid")


@dataclass(frozen=True)
class Variant:
    name: str
    policy: Policy[Any]
    reuse: Forecast = GRID


def preset(n: int, warm_up: int = 3, share: float = 0.06, strides: float = 0.5) -> Policy[Any]:
    """``skip-every-n``, with its parts at other values."""
    guard = at_most(n - 1) | tail(share) if share else at_most(n - 1)
    return first(warm_up) | guard & moved(strides)


def variants(n: int) -> list[Variant]:
    return [
        Variant(f"skip-every-{n}", preset(n)),
        Variant("held", preset(n), Forecast()),
        Variant("order 1", preset(n), Forecast(order=1, axis="grid")),
        Variant("order 3, bound 12", preset(n), Forecast(order=3, bound=12, axis="grid")),
        Variant("no bound", preset(n), Forecast(order=2, bound=1e9, axis="grid")),
        Variant("along t", preset(n), Forecast(order=2, axis="t")),
        Variant("half the input's change", preset(n), Forecast(order=2, beta=0.5, axis="grid")),
        Variant("the input's whole change", preset(n), Forecast(order=2, beta=1.0, axis="grid")),
        Variant("warm-up of one", preset(n, warm_up=1)),
        Variant("warm-up of two", preset(n, warm_up=2)),
        Variant("no tail", preset(n, share=0.0)),
        Variant("tail of 10 %", preset(n, share=0.1)),
        Variant("none held back (moved-0)", preset(n, strides=0.0)),
        Variant("held back by a stride (moved-1)", preset(n, strides=1.0)),
        Variant("no guard at all", every(n)),
    ]


def errors(model: Any, scheduler: Any, steps: int, seeds: Sequence[int], images: int, full: list[Tensor]) -> float:
    found = [fashion.sample(model, scheduler, seed, steps, images) for seed in seeds]
    return float(np.mean([relative_error(a, b) for a, b in zip(found, full, strict=True)]))


def report(model: Any, name: str, scheduler: Any, steps: int, seeds: Sequence[int], images: int) -> None:
    full = [fashion.sample(cachekit.unwrap(model), scheduler, seed, steps, images) for seed in seeds]
    print(f"\n{name}, {steps} steps")
    rivals: dict[int, float] = {}
    for n in (2, 3):
        for segments in ("model", "middle"):
            print(f"  period {n}, segments={segments!r}")
            for variant in variants(n):
                cachekit.wrap(model, variant.policy, segments=segments, reuse=variant.reuse)
                error = errors(model, scheduler, steps, seeds, images, full)
                price = sum(any(record.recomputed) for record in model.cachekit.stats.records)
                if segments == "middle":
                    price = sum(all(record.recomputed) for record in model.cachekit.stats.records)
                cachekit.unwrap(model)
                if price not in rivals:
                    rivals[price] = errors(model, scheduler, price, seeds, images, full)
                alone = f"so many steps alone {rivals[price]:.5f}"
                print(f"    {variant.name:32} {price:3} full steps  error {error:.5f}  {alone}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4)
    args = parser.parse_args()
    model, seeds = fashion.load_model(), range(args.seeds)
    with torch.inference_mode():
        report(model, "DDIM", fashion.ddim(), 50, seeds, args.images)
        report(model, "DPM-Solver++(2M)", fashion.dpm_solver(), 30, seeds, args.images)


if __name__ == "__main__":
    main()
