"""FORA, "fora-3"."""

from __future__ import annotations

from pydantic import PositiveInt, validate_call

from cachekit.policies.every import every
from cachekit.policies.last import last
from cachekit.preset import Preset


@validate_call
def fora(n: PositiveInt = 3) -> Preset:
    """Every n-th step and the last are full; on others each attention and MLP returns what it last did (FORA, arXiv 2407.01425).

    Blocks run on every step: their norms, modulations and gates are fresh, what is reused is the output before the gate. Needs
    the number of steps for the last, ``model.cachekit.session(steps=...)``; stats say where it was off. Holds one tensor for each
    module and output: two to three times a block's.

    Args:
        n: period; 2 to 7 in the paper, 3 is the authors' default.
    """
    return Preset(every(n) | last(1), segments="modules", reuse="output")
