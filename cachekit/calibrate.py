"""calibrate: what reuse of each site would cost at each step, from a few generations of the very model and sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cachekit.adapter import Adapter
from cachekit.calibration import LOOKAHEAD, Calibration, SiteRecord, Table, row
from cachekit.errors import ConfigError
from cachekit.fingerprint import Fingerprint
from cachekit.generations import Sample, Sampler, check_runs, check_sites, relative
from cachekit.json_files import SegmentSpec, segment_specs
from cachekit.measures import changes, gram, lookahead, norm_ratios
from cachekit.policies.every import every
from cachekit.policies.planned import planned
from cachekit.probes import ORDERS, check_orders, distinct, probe
from cachekit.recorder import Listening, Recording, recording
from cachekit.reuse import Forecast
from cachekit.segments import Segment
from cachekit.training_log import progress_bar

HELD = Forecast(axis="grid")
RESIDUAL = Forecast(beta=1.0, axis="grid")

# A sampler may use kernels whose sums are not in one order; noise that is not the run's own is 1000 times this and more.
SAME = 1e-3


@dataclass
class _Job:
    """One calibration under way: the sampler, the uncached samples by run, and what is told of each generation."""

    sampler: Sampler
    runs: tuple[int, ...]
    tick: Callable[[], Any]
    full: dict[int, Tensor]
    timesteps: tuple[float, ...] = ()

    def record(self, run: int, policy: Any, segments: Any, reuse: Any, *, attention: bool = False) -> Recording:
        """One uncached generation, looked at."""
        self.sampler.wrap(policy, segments, reuse)
        with recording(self.sampler.model, self.sampler.adapter, attention=attention) as found:
            sample = self.sampler.call(run).sample
        if run not in self.full:
            self.full[run] = sample
        if float(torch.linalg.vector_norm(relative(sample, self.full[run]))) > SAME:
            raise ConfigError(
                f"two uncached calls of sample({run}) gave different samples; start each from the noise of its run alone"
            )
        times = found.check()
        if self.timesteps and times != self.timesteps:
            raise ConfigError("two runs had different timesteps; sample every run with one scheduler and one number of steps")
        self.timesteps = times
        self.tick()
        return found

    def response(self, i: int, segments: list[Segment], reuse: Forecast) -> tuple[Tensor, float]:
        """The final sample's relative error where the site is reused at timestep i alone; the share of blocks that ran there."""
        others = tuple(k for k in range(len(self.timesteps)) if k != i)
        self.sampler.wrap(planned(others, self.timesteps), segments, reuse)
        outcome = self.sampler.call(self.runs[0])
        records = self.sampler.model.__dict__["cachekit"].stats.records
        share = [sum(record.recomputed) / max(1, len(record.recomputed)) for record in records if record.t == self.timesteps[i]]
        self.tick()
        return relative(outcome.sample, self.full[self.runs[0]]), float(np.mean(share)) if share else 1.0


def calibrate(
    model: nn.Module,
    sample: Sample,
    runs: int | Sequence[int] = 2,
    *,
    sites: Sequence[Any] = ("model", "middle"),
    probes: Sequence[int] = ORDERS,
    adapter: Adapter | str | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure what reuse of each site would cost at each step, and what thresholds and fitted methods need.

    Each run is sampled uncached once for the stack, and once for each site, keeping every value of it (as many tensors as there
    are steps, on the model's device). Then, for each site and each step but the first, the first run is sampled with that step
    alone reused, held and forecast: how much an error there is amplified on its way to the sample can't be told from the values,
    and it depends on the error's direction.

    Args:
        model: as for ``wrap``; it is wrapped meanwhile, and unwrapped afterwards.
        sample: ``sample(run)`` runs one whole generation with this model, from the noise of this number to the final sample, and
            returns that as a tensor, its batch first. It opens ``model.cachekit.session(steps=...)`` if it wants to.
        runs: how many runs (from 0), or their numbers. The first one gives the amplification.
        sites: segments, each as in ``wrap``; modules as well.
        probes: orders of the forecasts by which a step alone is reused; a generation for each step, site and order. One order does
            for thresholds and fitted methods; schedules' errors are predicted less well with it (docs/plans-measured.md).
        adapter: as in ``wrap``.
        progress: show a bar, where tqdm is installed.

    Returns:
        The calibration, for ``search`` and for fitted policies.

    Raises:
        ConfigError: segments or probes that can't be read, or a ``sample`` that is not one repeatable generation of one schedule.
        ModelError: the model can't be wrapped, or shows other values from step to step.
    """
    numbers, orders = check_runs(runs), check_orders(probes)
    named = {name if isinstance(name, str) else str(name): segment_specs(name) for name in check_sites(sites)}
    sampler = Sampler(model, sample, adapter)
    bar = progress_bar(len(numbers) * (1 + len(named)), 0, progress)
    job = _Job(sampler, numbers, (lambda: bar.update()) if bar is not None else (lambda: None), {})
    try:
        stack = _stack(job)
        if len(job.timesteps) < 2:
            raise ConfigError("sample makes a single step, which can't be reused; give it more of them")
        if bar is not None:
            bar.total += len(named) * sum(len(distinct(orders, i)) for i in range(len(job.timesteps)))
        found = {name: _site(job, specs, orders) for name, specs in named.items()}
    finally:
        sampler.unwrap()
        if bar is not None:
            bar.close()
    return Calibration(model=Fingerprint.of(model), timesteps=job.timesteps, runs=numbers, sites=found, **stack)


def _stack(job: _Job) -> dict[str, Any]:
    """Ratios of the residual's norms, and pairs of changes of what enters and leaves."""
    ratios, inputs, outputs = [], list[float](), list[float]()
    for run in job.runs:
        segments = [Segment("model", reuse=HELD), Segment(reuse=RESIDUAL)]
        found = job.record(run, every(1), segments, None, attention=True)
        ratios += [norm_ratios(values) for values in found.of_segment(1) if values[0].ndim]
        for b, entering in found.entering.items():
            prediction = next(values for (branch, k, _, _), values in found.values.items() if (branch, k) == (b, 0))
            inputs += changes(entering)[1:].tolist()
            outputs += changes(prediction)[1:].tolist()
    mean = tuple(float(value) for value in np.mean(ratios, axis=0)) if ratios else ()
    return {"ratios": mean, "input_changes": tuple(inputs), "output_changes": tuple(outputs)}


def _site(job: _Job, specs: tuple[SegmentSpec, ...], orders: tuple[int, ...]) -> SiteRecord:
    segments = [spec.segment() for spec in specs]
    # Modules and single blocks have no one block before them, and neither has what begins with the first.
    probing = all(isinstance(s.start, int) and s.start != 0 and not s.names and not s.each for s in segments)
    grams, curves, seen = [], [], []
    for run in job.runs:
        found = job.record(run, Listening() if probing else every(1), segments, HELD)
        if not found.values:
            raise ConfigError(f"segments={segments} cover nothing of this model; see cachekit.graph for what it has")
        grams.append(np.sum([gram(values) for values in found.values.values()], axis=0))
        curves.append(np.mean([lookahead(values, LOOKAHEAD) for values in found.values.values()], axis=0))
        seen += [states[0] for states in found.states.values() if probing]
    response, blocks = _responses(job, segments, orders)
    listened = np.mean(seen, axis=0) if seen else np.zeros((0, 2))
    return SiteRecord(
        segments=specs,
        gram=tuple(map(tuple, np.mean(grams, axis=0).tolist())),
        probes=orders,
        response=response,
        lookahead=tuple(row(values) for values in np.mean(curves, axis=0)),
        change=row(listened[:, 0]),
        front_change=row(listened[:, 1]),
        blocks=blocks,
    )


def _responses(job: _Job, segments: list[Segment], orders: tuple[int, ...]) -> tuple[Table, float]:
    """Inner products of what each probe does to the first run's sample, and the share of blocks that ran at the probed steps."""
    n = len(job.timesteps)
    places = [(k, i) for i in range(n) for k in distinct(orders, i)]
    found = [job.response(i, segments, probe(orders[k])) for k, i in places]
    at = [k * n + i for k, i in places]
    response = np.zeros((len(orders) * n, len(orders) * n))
    response[np.ix_(at, at)] = gram([error for error, _ in found])
    return tuple(map(tuple, response.tolist())), float(np.mean([share for _, share in found]))
