"""How near a calibration's predicted errors are to those of schedules that are run, by the number of its probes.

    python benchmarks/prediction.py --target plain --solvers DPM-Solver++(2M)-30 --sites model      # some minutes

For each solver and site it calibrates on one batch of images, draws schedules of every number of full steps at random beside the
periodic ones, and runs them on that batch with forecasts of order 1, 2 and 3. Printed is the root mean square of the logarithm of
predicted over true error: 0.1 is 10 % off, 0.7 a factor of two.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import search
from rich import box
from rich.console import Console
from rich.table import Table

import cachekit
from cachekit import Forecast
from cachekit.calibration import Calibration, SiteRecord
from cachekit.demo.measure import relative_error
from cachekit.error_model import ErrorModel
from cachekit.policies import planned

REUSES = tuple(Forecast(order, bound=12.0, axis="grid") for order in (1, 2, 3))
PROBES = ((1,), (0, 2), (1, 2), (0, 1, 2))
Schedule = tuple[int, ...]


def schedules(n: int, count: int, seed: int) -> dict[str, Schedule]:
    """Periods of two to four from each phase, and so many at random; the first step is always full."""
    found = {f"{period} from {at}": tuple(sorted({0, *range(at, n, period)})) for period in (2, 3, 4) for at in range(period)}
    generator = np.random.default_rng(seed)
    for k in range(count):
        full = generator.choice(range(1, n), int(generator.integers(n // 4, n - 2)), replace=False)
        found[f"random {k}"] = (0, *sorted(int(i) for i in full))
    return found


def with_probes(record: SiteRecord, orders: Sequence[int], n: int) -> SiteRecord:
    """What a calibration with some of its probes would have recorded; the first steps' probes are those of lower orders."""
    response, at = np.array(record.response), list[int]()
    for order in orders:
        at += [record.probes.index(min(order, max(i - 1, 0))) * n + i for i in range(n)]
    # Where two orders are one, the first stands for both.
    kept = np.array([at.index(place) == k for k, place in enumerate(at)])
    chosen = response[np.ix_(at, at)] * kept[:, None] * kept
    return record.model_copy(update={"probes": tuple(orders), "response": tuple(map(tuple, chosen.tolist()))})


def calibrated(bench: search.Bench, sites: list[str]) -> Calibration:
    """On the batch of images that the schedules are run on."""
    return cachekit.calibrate(bench.model, lambda run: bench.sample(range(run, run + 1)), runs=1, sites=sites)


def compare(bench: search.Bench, calibration: Calibration, site: str, args: argparse.Namespace) -> Table:
    """A row for each forecast, a column for each choice of probes."""
    n, made = len(calibration.timesteps), Table(box=box.MARKDOWN)
    for column in ("forecast", *(f"probes {', '.join(map(str, orders))}" for orders in PROBES)):
        made.add_column(column)
    full = bench.run("every-1", "model", None)[1]
    for reuse in REUSES:
        told = [ErrorModel(with_probes(calibration.site(site), orders, n), reuse, calibration.timesteps) for orders in PROBES]
        off = []
        for schedule in schedules(n, args.count, args.seed).values():
            true = relative_error(bench.run(planned(schedule, calibration.timesteps), site, reuse)[1], full)
            off.append([np.log(model.predict(schedule) / true) for model in told])
        made.add_row(f"order {reuse.order}", *(f"{value:.2f}" for value in np.sqrt(np.mean(np.square(off), axis=0))))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="plain")
    parser.add_argument("--solvers", nargs="*", default=["DDIM-20", "DPM-Solver++(2M)-30"])
    parser.add_argument("--sites", nargs="*", default=list(search.SITES))
    parser.add_argument("--count", type=int, default=20, help="random schedules")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules")
    args = parser.parse_args()
    args.first_seed, args.seeds, args.each = 0, 1, 4
    for solver in args.solvers:
        bench = search.Bench(solver, args)
        calibration = calibrated(bench, args.sites)
        for site in args.sites:
            Console(width=160).print(f"\n**{args.target}, {solver}, {site}**\n", compare(bench, calibration, site, args), sep="\n")


if __name__ == "__main__":
    main()
