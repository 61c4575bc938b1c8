"""Measure on the very model and sampler how much an error at one step becomes in the final sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveInt, validate_call
from torch import Tensor, nn

from cachekit.amplification import Amplification, length
from cachekit.errors import ConfigError, ModelError
from cachekit.estimates import Error
from cachekit.policy import Policy, Step
from cachekit.stats import Audit, Record
from cachekit.wrap import Handle, unwrap, wrap


@dataclass(frozen=True)
class _AllBut(Policy[None]):
    """Reuses at one step."""

    i: int

    def decide(self, state: None, step: Step) -> bool:
        return step.i != self.i


@validate_call(config={"arbitrary_types_allowed": True})
def measure_amplification(
    model: nn.Module, sample: Callable[[], Tensor], *, segments: Any = None, adapter: Any = None, points: PositiveInt = 8
) -> Amplification:
    """Disturb one step at a time, and see what becomes of the final sample.

    The disturbance is what reuse brings: at that step the segments return what they returned at the step before. Noise of the
    same size is no stand-in for it, a model removes most of that in its next steps (docs/error-budget.md). Its local error is
    the mean over segments and branches, as audits find it; so is the error of which ``ErrorBudget`` bounds the mean.

    Args:
        model: not wrapped; it is not when this returns either.
        sample: runs one generation with the model, always from the same noise, and returns its final sample.
        segments, adapter: as ``wrap``'s.
        points: number of steps that are disturbed, evenly chosen; each costs one generation.

    Returns:
        a(t) at these steps' timesteps.

    Raises:
        ConfigError: two runs of ``sample`` differ, or it runs more than one generation, less than two steps, or over an unknown
            range of t.
        ModelError: the model is wrapped, or no disturbance changed anything.
    """
    if isinstance(model.__dict__.get("cachekit"), Handle):
        raise ModelError("the model is wrapped; cachekit.unwrap(model) first, and wrap it again afterwards")
    try:
        true, records, _, span = _run(model, sample, segments, adapter, -1)
        if not true.equal(_run(model, sample, segments, adapter, -1)[0]):
            raise ConfigError("sample() gave two different samples; let it begin from the same noise in each call")
        times = list({record.i: record.t for record in records}.values())
        if len(times) < 2 or span is None:
            raise ConfigError(
                f"sample() ran {len(times)} steps, and t's range is {span}; there must be two, and a range: "
                "adapter=cachekit.Adapter(range=...)"
            )
        chosen = sorted({round(1 + (len(times) - 2) * k / max(points - 1, 1)) for k in range(points)})
        found: dict[float, float] = {}
        for i in chosen:
            disturbed, _, audits, _ = _run(model, sample, segments, adapter, i)
            factor = _factor(disturbed, true, audits)
            step = Step(i, times[i], previous_t=times[i - 1], range=span)
            if factor is not None and (h := length(step, 0.0)) > 0:
                found[times[i]] = factor / h
    finally:
        unwrap(model)
    if not any(found.values()):
        raise ModelError("nothing changed where something was reused; are there blocks in the segments, and is reuse not off?")
    return Amplification(tuple(found), tuple(found.values()))


def _run(
    model: nn.Module, sample: Callable[[], Tensor], segments: Any, adapter: Any, i: int
) -> tuple[Tensor, list[Record], list[Audit], float | None]:
    """One generation that reuses held values at step i alone: the sample, its records and audits, and the range of t."""
    wrap(model, _AllBut(i), segments=segments, reuse="output", adapter=adapter, audit_every=1)
    handle: Handle = model.__dict__["cachekit"]
    found = sample().detach().clone()
    if handle.stats.generations > 1:
        raise ConfigError(
            f"sample() ran {handle.stats.generations} generations; let it run one, within model.cachekit.session() where cachekit "
            "takes one for several"
        )
    return found, handle.stats.records, handle.stats.audits, handle.adapter.range


def _factor(disturbed: Tensor, true: Tensor, audits: list[Audit]) -> float | None:
    """The final error over the mean local error; None where nothing was off."""
    local = [site.error for audit in audits for site in audit.sites]
    mean = sum(local) / len(local) if local else 0.0
    if mean == 0:
        return None
    final = Error()
    final.add(disturbed, true)
    return final.value / mean
