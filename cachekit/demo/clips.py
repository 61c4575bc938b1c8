"""The video models: class-conditional Latte transformers trained on clips of vizdoom by ``training/video_latte.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor
from torch.nn import functional

import cachekit
from cachekit.demo.efficientnet import Efficientnet, available
from cachekit.demo.fashion import ddim, dpm_solver
from cachekit.demo.noise import start
from cachekit.demo.stored import with_weights
from cachekit.demo.target import Solver, Target

CLASSES = (
    "basic",
    "defend the center",
    "defend the line",
    "health gathering",
    "my way home",
    "predict position",
    "take cover",
    "deadly corridor",
)
FRAMES, SIZE = 8, 32
FINE_STEPS = 200
PREDICTION = "sample"
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 6,
    "cross_attention_dim": 128,
    "attention_bias": True,
    "sample_size": SIZE,
    "patch_size": 4,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": len(CLASSES),
    "video_length": FRAMES,
}


def new_model() -> LatteTransformer3DModel:
    """A Latte of the shipped shape (6 spatial and 6 temporal blocks, width 128, 8 frames of 64 tokens), untrained.

    It predicts the clean clips (diffusers' ``sample``), shape (n, 3, 8, 32, 32) in [-1, 1] at timesteps 0 ... 999 of
    diffusers' linear schedule.
    """
    return LatteTransformer3DModel(**CONFIG).eval()


def load_model(weights: str | Path = "clips_latte") -> LatteTransformer3DModel:
    """The plain Latte, trained by ``training/video_latte.py``.

    Raises:
        ConfigError: no such weights (this version of the package may come without), or those of another model.
    """
    return with_weights(new_model(), weights)


def load_skip_model(weights: str | Path = "clips_skip_latte") -> LatteTransformer3DModel:
    """The same with long skip connections from the start, the paper's fusions.

    Raises:
        ConfigError: no such weights (this version of the package may come without), or those of another model.
    """
    return with_weights(cachekit.add_long_skips(new_model(), fusion="paper", seed=0), weights)


def caption(labels: Tensor) -> Tensor:
    """Classes (n,) as the model's captions (n, 1, 8): a single token, one-hot.

    The first layer of the model's own caption projection is then a table of class embeddings, so that nothing but the model's
    weights need be stored.
    """
    return functional.one_hot(labels, len(CLASSES)).float()[:, None]


def sample(model: Any, scheduler: Any, seed: int | Sequence[int], steps: int, clips: int) -> Tensor:
    """Clips (n, 3, 8, 32, 32) of a noise seed, or of several in one batch; which classes, ``cachekit.demo.noise`` says."""
    x, labels = start(seed, clips, (3, FRAMES, SIZE, SIZE), len(CLASSES))
    captions = caption(labels)
    scheduler.set_timesteps(steps)
    handle = getattr(model, "cachekit", None)
    with torch.inference_mode(), handle.session(steps=steps) if handle is not None else contextlib.nullcontext():
        for t in scheduler.timesteps:
            predicted = model(x, timestep=t.expand(len(x)), encoder_hidden_states=captions).sample
            x = scheduler.step(predicted, t, x).prev_sample
    return x


def target(clips: int = 4, weights: str | Path = "clips_latte") -> Target:
    """The plain Latte, as ``cachekit compare`` shows it.

    Args:
        clips: per noise seed.
        weights: as in ``load_model``.
    """
    return target_of("a class-conditional Latte (12 blocks, clips of vizdoom)", load_model(weights), clips)


def skip_target(clips: int = 4, weights: str | Path = "clips_skip_latte") -> Target:
    """The Latte with long skip connections, from the same noise as the plain one."""
    return target_of("a class-conditional Latte with long skips (12 blocks, clips of vizdoom)", load_skip_model(weights), clips)


def target_of(name: str, model: LatteTransformer3DModel, clips: int) -> Target:
    """A target of a model of this shape. Distances are to clips of games that no model was trained on."""

    def with_scheduler(scheduler: Any) -> Any:
        return lambda seed, steps: sample(model, scheduler, seed, steps, clips)

    real = (Efficientnet("efficientnet_clips", kind) for kind in ("clips", "motion")) if available() else ()
    return Target(
        name,
        model,
        (
            Solver("DDIM", with_scheduler(ddim(PREDICTION)), 50),
            Solver("DPM-Solver++(2M)", with_scheduler(dpm_solver(PREDICTION)), 30),
        ),
        fine=lambda seed: sample(model, dpm_solver(PREDICTION), seed, FINE_STEPS, clips),
        real=tuple(real),
        pixels=lambda x: x.clamp(-1, 1) / 2 + 0.5,
    )
