"""What a reused site returns, one file a method. A new one: write its file, and add its name to ``REUSES``.

Every method is a weighted sum of stored values, so that its weights are all that it must say (``cachekit.Reuse``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cachekit.policies.reuses.bdf import Bdf
from cachekit.policies.reuses.chebyshev import Chebyshev
from cachekit.policies.reuses.frequencies import Frequencies
from cachekit.policies.reuses.hermite import Hermite
from cachekit.policies.reuses.log_snr import FlowLogSnr, LogSnr
from cachekit.policies.reuses.mix import Mix
from cachekit.policies.reuses.polynomial import output, residual, taylor
from cachekit.policies.reuses.scale import Scale
from cachekit.policies.reuses.taylorseer import TaylorSeer
from cachekit.policies.reuses.tokens import Tokens
from cachekit.reuse import Reuse

__all__ = [
    "Bdf",
    "Chebyshev",
    "FlowLogSnr",
    "Frequencies",
    "Hermite",
    "LogSnr",
    "Mix",
    "Scale",
    "TaylorSeer",
    "Tokens",
    "output",
    "residual",
    "taylor",
]

# Name in a spec string -> what makes the reuse from the numbers behind it. Scale needs a calibration, so it has no name here.
REUSES: Mapping[str, Callable[..., Reuse]] = MappingProxyType(
    {
        "output": output,
        "residual": residual,
        "taylor": taylor,
        "taylorseer": TaylorSeer,
        "hermite": Hermite,
        "chebyshev": Chebyshev,
        "bdf": Bdf,
        "mix": Mix,
        "frequencies": Frequencies,
        "tokens": Tokens,
    }
)
