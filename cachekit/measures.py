"""What is measured of one tensor's values over the steps of an uncached generation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

# Elements that are widened to double precision at once.
_PIECE = 1 << 22


def gram(values: Sequence[Tensor]) -> Matrix:
    """Inner products of every two of n values, (n, n), summed in double precision.

    The error of any forecast that is linear in the values follows from them: |z_i - Σ w_j z_j|² is a quadratic form in the weights.
    """
    flat = [value.detach().flatten() for value in values]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    piece = max(1, _PIECE // len(flat))
    for start in range(0, flat[0].numel(), piece):
        rows = torch.stack([value[start : start + piece].double() for value in flat])
        total += rows @ rows.T
    found: Matrix = total.cpu().numpy()
    return found


def lookahead(values: Sequence[Tensor], reach: int) -> Matrix:
    """Σ|z_i - z_(i+k)| / Σ|z_(i+k)| in row k - 1 (k = 1 ... reach) and column i, (reach, n); NaN where i + k is past the end.

    The error of holding a value for k steps (arXiv 2411.10510, eq. 4).
    """
    found = np.full((reach, len(values)), np.nan)
    for k in range(1, reach + 1):
        pairs = zip(values, values[k:], strict=False)
        changes = [(then.double() - now.double()).abs().sum() / now.double().abs().sum() for then, now in pairs]
        if changes:
            found[k - 1, : len(changes)] = torch.stack(changes).cpu().numpy()
    return found


def changes(values: Sequence[Tensor]) -> Matrix:
    """mean|z_i - z_(i-1)| / mean|z_(i-1)|, (n,); NaN for the first (arXiv 2411.19108, eq. 4)."""
    found = [(now.double() - then.double()).abs().mean() / then.double().abs().mean() for then, now in pairwise(values)]
    return np.concatenate([[np.nan], torch.stack(found).cpu().numpy() if found else []])


def norm_ratios(values: Sequence[Tensor]) -> Matrix:
    """Mean over the tokens of |z_i| / |z_(i-1)|, norms over the last axis, (n,); 1 for the first (arXiv 2506.09045)."""
    norms = [torch.linalg.vector_norm(value.double(), dim=-1) for value in values]
    found = [(now / then).mean() for then, now in pairwise(norms)]
    return np.concatenate([[1.0], torch.stack(found).cpu().numpy() if found else []])
