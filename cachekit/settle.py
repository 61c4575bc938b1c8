"""The order of a schedule's forecast, and how much of its input's change it passes on, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cachekit.candidates import Candidate

# Orders, shares of the input's change, doublings of the bound, and what it must be at the least. The first two pay together: a
# higher order overshoots less where the input's own change is passed on. One step behind recomputes at every other step order 3
# has weights of 6 in all, two steps behind recomputes at every third 8.5; a bound that lets longer gaps through harms there.
SNUG, WIDE = 6.5, 12.0
DIRECTIONS = (
    (1 / 2, 0.0, 0.0, SNUG),
    (1 / 2, 0.0, 0.0, WIDE),
    (0.0, 1 / 8, 0.0, 0.0),
    (1 / 2, 1 / 8, 0.0, SNUG),
    (1 / 2, 1 / 8, 0.0, WIDE),
    (0.0, 0.0, 1.0, 0.0),
)
HALVINGS = 2


def settled(best: Candidate, better: Callable[[Candidate, Candidate], bool], *, tries: int, highest: int) -> Candidate:
    """The candidate with an order (``blend``), a share of the input's change (``beta``) and a bound that no small step betters.

    A calibration knows nothing of inputs, so that their share can't be predicted, and what an order's errors do together is
    predicted less well than which steps to recompute; but the error is a smooth function of them, whose least is hardly ever at a
    round number. Steps up and down from where it is, halved as soon as none helps: halves to eighths of an order, eighths to
    thirty-seconds of the share, both at once, and twice to a fifth more or less of the bound.

    Args:
        best: what to start from.
        better: whether its first argument's error is below that of its second.
        tries: how many others are measured at the most.
        highest: order that is not passed, since it takes a tensor more.

    Returns:
        The best that was measured: the candidate itself, or it with another reuse.
    """
    tried, size = {best}, 1.0
    while size >= 1 / 2**HALVINGS:
        start = best
        for orders, share, doublings, least in DIRECTIONS:
            for by in (size, -size):
                candidate = _stepped(best, by * orders, by * share, by * doublings, least, highest)
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


def _stepped(candidate: Candidate, orders: float, share: float, doublings: float, least: float, highest: int) -> Candidate | None:
    """The candidate some steps away; None where an order or a share is out of range."""
    reuse = candidate.reuse
    degree, beta, bound = reuse.order + reuse.blend + orders, reuse.beta + share, max(reuse.bound * 2**doublings, least)
    if not (0 <= degree <= highest and 0 <= beta <= 1):
        return None
    return replace(candidate, reuse=replace(reuse, order=int(degree), blend=degree % 1, beta=beta, bound=bound))
