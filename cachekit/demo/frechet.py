"""The Frechet distance between samples and real images, in the features of a small classifier."""

from __future__ import annotations

from importlib import resources

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

FEATURES = 16
DRAWS = 50


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
        stored = load(resources.files("cachekit.demo").joinpath("weights/features.safetensors").read_bytes())
        self.real = stored.pop("real").double().numpy()
        self.classifier = new_classifier().eval()
        self.classifier.load_state_dict({key: value.float() for key, value in stored.items()})

    @torch.inference_mode()
    def features(self, images: Tensor) -> NDArray[np.float64]:
        """Images (n, 1, 28, 28) in [-1, 1] to features (n, 16)."""
        found: NDArray[np.float64] = self.classifier[:-1](images.clamp(-1, 1)).double().numpy()
        return found

    def distance(self, images: Tensor) -> float:
        """Frechet distance of images (n, 1, 28, 28) to all the real ones."""
        return frechet(self.features(images), self.real)

    def floor(self, n: int) -> tuple[float, float]:
        """Mean and standard deviation of the distance of n real images, drawn at random, to all of them."""
        rng = np.random.default_rng(0)
        drawn = [frechet(self.real[rng.choice(len(self.real), n, replace=False)], self.real) for _ in range(DRAWS)]
        return float(np.mean(drawn)), float(np.std(drawn))


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Squared Frechet distance of two Gaussians fitted to features (n, d): |μa − μb|² + tr(Ca + Cb − 2 (Ca Cb)^½)."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mixed = np.trace(np.real(scipy.linalg.sqrtm(ca @ cb)))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca) + np.trace(cb) - 2 * mixed)
