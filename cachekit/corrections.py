"""How much of its input's change a schedule's reuse should pass on, found by running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cachekit.candidates import Candidate

WIDEST, NARROWEST = 1 / 8, 1 / 32


def corrected(best: Candidate, error: Callable[[Candidate], float], tries: int = 6) -> Candidate:
    """The candidate with a share of the input's change (``beta``) from which no small step betters it.

    A calibration knows nothing of inputs, so this share can't be predicted; but the error is a smooth function of it, whose least
    is hardly ever at a round number. Steps up and down from where it is, halved as soon as neither helps.

    Args:
        best: what to start from.
        error: measures a candidate; infinite where it can't be run. One that was measured before costs nothing.
        tries: how many shares are measured at the most.

    Returns:
        The best that was measured: the candidate itself, or it with another share.
    """
    known = {best.reuse.beta: error(best)}
    beta, step = best.reuse.beta, WIDEST
    # Where nothing is reused, or to no effect, no share does better.
    while step >= NARROWEST and known[beta] > 0:
        least = known[beta]
        for share in (beta + step, beta - step):
            if not 0 <= share <= 1 or share in known:
                continue
            if len(known) > tries:
                return _passing(best, beta)
            known[share] = error(_passing(best, share))
            if known[share] < least:
                beta = share
                break
        else:
            step /= 2
    return _passing(best, beta)


def _passing(candidate: Candidate, beta: float) -> Candidate:
    return replace(candidate, reuse=replace(candidate.reuse, beta=beta))
