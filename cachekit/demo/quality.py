"""What a comparison says of samples beyond their error: Frechet distances, PSNR and SSIM, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachekit.demo import bootstrap
from cachekit.demo.bootstrap import Interval
from cachekit.demo.frechet import Features, frechet
from cachekit.demo.target import Target

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """Of the samples of one row.

    Attributes:
        frechet: distance to real data, for each kind of features; its interval takes the real data as they are.
        change: distance over that of the same model uncached, less 1; paired.
        psnr, ssim: mean over samples against the same model uncached; None where torchmetrics is missing, a target shows no
            pixels, or (psnr) a sample equals the uncached one.
    """

    frechet: dict[str, Interval] = field(default_factory=dict)
    change: dict[str, Interval] = field(default_factory=dict)
    psnr: Interval | None = None
    ssim: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        """Figures and intervals; None where there is none."""
        by_kind = {"frechet": self.frechet, "frechet_to_uncached": self.change}
        return {
            **{key: {name: found.as_json() for name, found in kinds.items()} for key, kinds in by_kind.items()},
            "psnr": None if self.psnr is None else self.psnr.as_json(),
            "ssim": None if self.ssim is None else self.ssim.as_json(),
        }


def assess(target: Target, samples: Sequence[Tensor]) -> list[Quality]:
    """The quality of every row.

    Args:
        target: whose features and pixels are used.
        samples: of each row, (n, ...), the same noise at the same place; the uncached row first.

    Returns:
        One for each row. Intervals are left open below ``bootstrap.LEAST_SAMPLES`` samples.
    """
    n = len(samples[0])
    counts = bootstrap.resamples(n) if n >= bootstrap.LEAST_SAMPLES else None
    distances = [_distances(kind, samples, counts) for kind in target.real]
    similar = [_similarity(target, rows, samples[0], counts) for rows in samples]
    made = []
    for k, (psnr, ssim) in enumerate(similar):
        levels = {kind.name: found[k][0] for kind, found in zip(target.real, distances, strict=True)}
        changes = {kind.name: found[k][1] for kind, found in zip(target.real, distances, strict=True)}
        made.append(Quality(levels, changes if k else {}, psnr if k else None, ssim if k else None))
    return made


def _distances(kind: Features, samples: Sequence[Tensor], counts: Values | None) -> list[tuple[Interval, Interval]]:
    """Level and relative change of each row's distance."""
    features = [kind.features(rows) for rows in samples]
    values = [frechet(rows, kind.real) for rows in features]
    if counts is None:
        return [(Interval(value), Interval(value / values[0] - 1)) for value in values]
    resampled = [bootstrap.frechet_resampled(rows, kind.real, counts) for rows in features]
    return [
        (bootstrap.interval(value, each), bootstrap.relative_change(value, values[0], each, resampled[0]))
        for value, each in zip(values, resampled, strict=True)
    ]


def _similarity(
    target: Target, samples: Tensor, uncached: Tensor, counts: Values | None
) -> tuple[Interval | None, Interval | None]:
    if target.pixels is None or samples is uncached:
        return None, None
    try:
        from torchmetrics.functional import image
    except ImportError:
        return None, None
    ours, theirs = (_as_images(target.pixels(each)) for each in (samples, uncached))
    noise: Any = image.peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    structure: Any = image.structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    return _mean(noise, len(samples), counts), _mean(structure, len(samples), counts)


def _as_images(pixels: Tensor) -> Tensor:
    """(n, c, h, w) as it is; the frames of (n, c, frames, h, w) one by one, a sample's together."""
    return pixels if pixels.ndim == 4 else pixels.transpose(1, 2).flatten(0, 1)


def _mean(values: Tensor, n: int, counts: Values | None) -> Interval | None:
    """Over samples; frames are averaged first."""
    if not bool(torch.isfinite(values).all()):
        return None
    each = values.double().reshape(n, -1).mean(1).numpy()
    return Interval(float(each.mean())) if counts is None else bootstrap.mean_interval(each, counts)
