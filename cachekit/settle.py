"""The order of a schedule's forecast, and how much of its input's change it passes on, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cachekit.candidates import Candidate
from cachekit.reuse import Forecast

# A high order's weights are bounded for whole orders; the share of it that is used is a bound as well, and found by running.
WIDE = 12.0
HALVINGS = 2


@dataclass(frozen=True)
class _Knob:
    """A number of a forecast: the widest step, the most that it may be, how it is read and set."""

    step: float
    most: float
    get: Callable[[Forecast], float]
    put: Callable[[Forecast, float], Forecast]

    def turned(self, candidate: Candidate, by: float) -> Candidate | None:
        """The candidate with another number; None where that is out of range."""
        value = self.get(candidate.reuse) + by * self.step
        return replace(candidate, reuse=self.put(candidate.reuse, value)) if 0 <= value <= self.most else None


def _with_degree(reuse: Forecast, degree: float) -> Forecast:
    return replace(reuse, order=int(degree), blend=degree % 1, bound=max(reuse.bound, WIDE))


def settled(best: Candidate, better: Callable[[Candidate, Candidate], bool], *, tries: int, highest: int) -> Candidate:
    """The candidate with a share of the input's change (``beta``) and an order (``blend``) from which no small step betters it.

    A calibration knows nothing of inputs, so that their share can't be predicted, and what an order's errors do together is
    predicted less well than which steps to recompute; but the error is a smooth function of both, whose least is hardly ever at a
    round number. Steps up and down from where it is, halved as soon as none helps: eighths to thirty-seconds of the share, halves
    to eighths of an order.

    Args:
        best: what to start from.
        better: whether its first argument's error is below that of its second.
        tries: how many others are measured at the most.
        highest: order that is not passed, since it takes a tensor more.

    Returns:
        The best that was measured: the candidate itself, or it with another reuse.
    """
    degree = _Knob(1 / 2, float(highest), lambda reuse: reuse.order + reuse.blend, _with_degree)
    share = _Knob(1 / 8, 1.0, lambda reuse: reuse.beta, lambda reuse, value: replace(reuse, beta=value))
    tried, size = {best}, 1.0
    while size >= 1 / 2**HALVINGS:
        start = best
        for knob in (degree, share):
            for by in (size, -size):
                candidate = knob.turned(best, by)
                if candidate is None or candidate in tried:
                    continue
                if len(tried) > tries:
                    return best
                tried.add(candidate)
                if better(candidate, best):
                    best = candidate
                    break
        if best is start:
            size /= 2
    return best
