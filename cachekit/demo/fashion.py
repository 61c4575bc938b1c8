"""The shipped target: a class-conditional DiT trained on Fashion-MNIST by ``training/image_dit.py``."""

from __future__ import annotations

from importlib import resources

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load

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


def new_model() -> DiTTransformer2DModel:
    """A DiT of the shipped shape (8 blocks, width 128, 49 tokens) with untrained weights.

    It predicts the noise of images (n, 1, 28, 28) in [-1, 1] at timesteps 0 ... 999 of diffusers' linear schedule.
    """
    return DiTTransformer2DModel(**CONFIG).eval()


def load_model() -> DiTTransformer2DModel:
    """The trained DiT from the package's own weights (half precision on disk, float32 in memory)."""
    raw = resources.files("cachekit.demo").joinpath("weights/fashion_dit.safetensors").read_bytes()
    model = new_model()
    model.load_state_dict({key: value.to(torch.float32) for key, value in load(raw).items()})
    return model
