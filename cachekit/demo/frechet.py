"""The Frechet distance between samples and real images, in the features of a small classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cachekit.demo.stored import stored_weights

FEATURES = 16
DRAWS = 50


class Features(Protocol):
    """What a Frechet distance is measured in.

    Attributes:
        name: as the tables show it.
        real: features of real data that no model was trained on, (m, d).
    """

    name: str
    real: NDArray[np.float64]

    def features(self, samples: Tensor) -> NDArray[np.float64]:
        """Samples (n, ...) as the solver returns them to features (n, d)."""


def new_classifier() -> nn.Sequential:
    """Images (n, 1, 28, 28) in [-1, 1] to 10 classes; the last layer but one gives 16 features."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, FEATURES),
        nn.Tanh(),
        nn.Linear(FEATURES, 10),
    )


class Realism:
    """Distances to the held-out images whose features come with the package (never used in training).

    ``training/features.py`` makes classifier and features.
    """

    def __init__(self) -> None:
        stored: Mapping[str, Tensor] = stored_weights("features")
        self.name = "classifier"
        self.real = stored["real"].double().numpy()
        self.classifier = new_classifier().eval()
        self.classifier.load_state_dict({key: value for key, value in stored.items() if key != "real"})

    @torch.inference_mode()
    def features(self, samples: Tensor) -> NDArray[np.float64]:
        """Images (n, 1, 28, 28) in [-1, 1] to features (n, 16)."""
        found: NDArray[np.float64] = self.classifier[:-1](samples.clamp(-1, 1)).double().numpy()
        return found


def distance(kind: Features, samples: Tensor) -> float:
    """Frechet distance of samples (n, ...) to all the real data."""
    return frechet(kind.features(samples), kind.real)


def floor(kind: Features, n: int) -> tuple[float, float]:
    """Mean and standard deviation of the distance of n real samples, drawn at random, to all of them.

    Where there are fewer than n, they are drawn with replacement.
    """
    rng, m = np.random.default_rng(0), len(kind.real)
    drawn = [frechet(kind.real[rng.choice(m, n, replace=n > m)], kind.real) for _ in range(DRAWS)]
    return float(np.mean(drawn)), float(np.std(drawn))


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared Frechet distance of two Gaussians fitted to features (n, d): |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½)."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mixed = np.trace(np.real(scipy.linalg.sqrtm(ca @ cb)))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca) + np.trace(cb) - 2 * mixed)
