"""What samples of a shipped model start from: the noise of seeds, and the classes that go with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def start(seeds: int | Sequence[int], each: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    """The noise of one seed or several in a batch, a seed's the same beside whichever others, and a class for each sample.

    Args:
        seeds: one, or several.
        each: samples of a seed.
        shape: of one sample.
        classes: how many there are. They count on from seed to seed, so that all get their turn.

    Returns:
        Noise (seeds * each, *shape) and classes (seeds * each,).
    """
    numbers = (seeds,) if isinstance(seeds, int) else tuple(seeds)
    noise = [torch.randn(each, *shape, generator=torch.Generator().manual_seed(number)) for number in numbers]
    labels = [(torch.arange(each) + number * each) % classes for number in numbers]
    return torch.cat(noise), torch.cat(labels)
