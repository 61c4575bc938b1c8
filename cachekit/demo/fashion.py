"""The image models: class-conditional DiTs trained on Fashion-MNIST, plain by ``training/image_dit.py``, and a Skip-DiT."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import Tensor

import cachekit
from cachekit.demo.efficientnet import Efficientnet, available
from cachekit.demo.frechet import Realism
from cachekit.demo.noise import start
from cachekit.demo.stored import with_weights
from cachekit.demo.target import Solver, Target

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 8,
    "sample_size": 28,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FINE_STEPS = 500


def new_model() -> DiTTransformer2DModel:
    """A DiT of the shipped shape (8 blocks, width 128, 49 tokens) with untrained weights.

    It predicts the noise of images (n, 1, 28, 28) in [-1, 1] at timesteps 0 ... 999 of diffusers' linear schedule.
    """
    return DiTTransformer2DModel(**CONFIG).eval()


def load_model(weights: str | Path = "fashion_dit") -> DiTTransformer2DModel:
    """The trained DiT from the package's own weights, or others of this shape.

    Raises:
        ConfigError: no such weights, or those of another model.
    """
    return with_weights(new_model(), weights)


def load_skip_dit(weights: str | Path = "fashion_skip_dit", fusion: str = "paper") -> DiTTransformer2DModel:
    """The Skip-DiT of the same shape, trained from scratch with the paper's fusions by ``training/image_skip_dit.py``.

    Args:
        weights: the package's own, or others that were trained with this fusion. Files do not say which one it was.
        fusion: as in ``add_long_skips``.

    Raises:
        ConfigError: no such weights (this version of the package may come without), or those of another model.
    """
    return with_weights(cachekit.add_long_skips(new_model(), fusion=fusion, seed=0), weights)


# Each solver on its best grid. Relative error to the fine solution on development seeds, at 50 steps: DDIM trailing .034,
# linspace .035, leading .032 (but .057 at 25 steps against trailing's .056); at 30 steps: DPM-Solver++(2M) even in log-SNR .010,
# Karras .012, linspace .030, trailing .029.
def ddim(prediction: str = "epsilon") -> Any:
    """DDIM on trailing timesteps; the prediction as diffusers' schedulers name it."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", prediction_type=prediction)


def dpm_solver(prediction: str = "epsilon") -> Any:
    """DPM-Solver++(2M) on a grid that is even in log-SNR."""
    return DPMSolverMultistepScheduler(
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_lu_lambdas=True,
        prediction_type=prediction,
    )


def sample(model: Any, scheduler: Any, seed: int | Sequence[int], steps: int, images: int) -> Tensor:
    """Images (n, 1, 28, 28) of a noise seed, or of several in one batch; which classes, ``cachekit.demo.noise`` says."""
    x, labels = start(seed, images, (1, 28, 28), len(CLASSES))
    scheduler.set_timesteps(steps)
    handle = getattr(model, "cachekit", None)
    with torch.inference_mode(), handle.session(steps=steps) if handle is not None else contextlib.nullcontext():
        for t in scheduler.timesteps:
            noise = model(x, timestep=t.expand(len(x)), class_labels=labels).sample
            x = scheduler.step(noise, t, x).prev_sample
    return x


def target(images: int = 4, weights: str | Path = "fashion_dit") -> Target:
    """The plain DiT, as ``cachekit compare`` shows it.

    Args:
        images: per noise seed.
        weights: as in ``load_model``.
    """
    return target_of("a class-conditional DiT (8 blocks, Fashion-MNIST)", load_model(weights), images)


def skip_target(images: int = 4, weights: str | Path = "fashion_skip_dit", fusion: str = "paper") -> Target:
    """The Skip-DiT, from the same noise as the plain one."""
    return target_of("a class-conditional Skip-DiT (8 blocks, Fashion-MNIST)", load_skip_dit(weights, fusion), images)


def retrofit_target(images: int = 4, weights: str | Path = "fashion_retrofit") -> Target:
    """The plain DiT after a retrofit with residual fusions (``training/image_retrofit.py``)."""
    return target_of("a retrofitted Skip-DiT (8 blocks, Fashion-MNIST)", load_skip_dit(weights, "residual"), images)


def control_target(images: int = 4, weights: str | Path = "fashion_control") -> Target:
    """The plain DiT, trained on for as long as the retrofitted one."""
    return target_of("a DiT, trained on (8 blocks, Fashion-MNIST)", load_model(weights), images)


def target_of(name: str, model: DiTTransformer2DModel, images: int) -> Target:
    """A target of a model of this shape."""

    def with_scheduler(scheduler: Any) -> Any:
        return lambda seed, steps: sample(model, scheduler, seed, steps, images)

    return Target(
        name,
        model,
        (Solver("DDIM", with_scheduler(ddim()), 50), Solver("DPM-Solver++(2M)", with_scheduler(dpm_solver()), 30)),
        fine=lambda seed: sample(model, dpm_solver(), seed, FINE_STEPS, images),
        real=(Realism(), *([Efficientnet("efficientnet_fashion", "images")] if available() else [])),
        pixels=lambda x: x.clamp(-1, 1) / 2 + 0.5,
    )
