"""What the tests of calibrations, searches and plans share: a small DiT with a short DDIM loop of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from zoo import DIT

STEPS = 8


def scheduler(steps: int = STEPS) -> DDIMScheduler:
    made = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    made.set_timesteps(steps)
    return made


def grid(steps: int = STEPS) -> tuple[float, ...]:
    return tuple(float(t) for t in scheduler(steps).timesteps)


def sampling(model: Any, steps: int = STEPS) -> Callable[[int], Tensor]:
    """``sample(run)``: two images of a run's noise, (2, 4, 8, 8)."""

    def sample(run: int) -> Tensor:
        made = scheduler(steps)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(run))
        labels = torch.tensor([1, 7])
        with torch.no_grad():
            for t in made.timesteps:
                noise = model(x, timestep=t.expand(2), class_labels=labels).sample[:, :4]
                x = made.step(noise, t, x).prev_sample
        return x

    return sample


def small() -> Any:
    """Six blocks of width 32; its gates are no zeros."""
    return DIT.build()
