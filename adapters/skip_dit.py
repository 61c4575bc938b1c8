"""Skip-DiT's released checkpoints (arXiv 2411.17616): the fusions stand beside the base model's parameters.

``skip_norms.k`` and ``skip_linears.k.linear`` belong to unit L/2 + k, whose long skip is the output of unit L/2 - 1 - k.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_KEY = re.compile(r"skip_(?:norms\.(\d+)\.|linears\.(\d+)\.(?=linear\.))(.+)")


def read_released(state: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """A released state dict as the base model's part and one state dict for each fusion, in the order of k.

    Returns:
        None where it holds no such keys. A fusion's keys are ``norm.*`` and ``linear.*``.
    """
    base: dict[str, Any] = {}
    fusions: dict[int, dict[str, Any]] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            base[key] = value
        else:
            norm, linear, rest = match.groups()
            fusions.setdefault(int(norm or linear), {})[f"norm.{rest}" if norm else rest] = value
    return (base, [fusions.get(k, {}) for k in range(max(fusions) + 1)]) if fusions else None


def released_pair(k: int, units: int) -> tuple[int, int]:
    """The (early, late) units of fusion k."""
    return units // 2 - 1 - k, units // 2 + k
