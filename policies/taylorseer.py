"""TaylorSeer, "taylorseer-5-1"."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt, validate_call

from cachekit.policies.at_most import at_most
from cachekit.policies.first import first
from cachekit.policies.reuses.taylorseer import TaylorSeer
from cachekit.preset import Preset


@validate_call
def taylorseer(n: PositiveInt, order: NonNegativeInt = 1, *, warm_up: NonNegativeInt = 3) -> Preset:
    """Full steps at first, then one in every n, and TaylorSeer's forecast of the stack's output between (arXiv 2503.06923).

    The authors forecast each attention and MLP output, 2 tensors a block and order; here it is the stack's output, one tensor a
    stream and order. As in their code, a step counts as one however far t moves. Order 0 holds the output.

    Args:
        n: period, counted from the last full step.
        order: of the forecast; 1 to 4 in the paper.
        warm_up: number of full steps at first; 3 in the authors' code for FLUX.
    """
    return Preset(first(warm_up) | at_most(n - 1), segments="all", reuse=TaylorSeer(order, axis="grid"))
