"""Train the class-conditional DiT that cachekit ships: Fashion-MNIST, noise prediction, two cores, about an hour.

    python training/image_dit.py --data FOLDER --out runs/image_dit --export cachekit/demo/weights/fashion_dit.safetensors

It can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusion
import fashion_mnist
from torch import nn

from cachekit.demo.fashion import new_model


def initialise(model: nn.Module) -> None:
    """As every model here; each block starts as the identity, the output at zero, and short waves are left out."""
    diffusion.initialise(model)
    for name, module in model.named_modules():
        if name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
            nn.init.zeros_(module.weight)
        elif name.endswith("timestep_embedder.linear_1"):
            diffusion.leave_out_short_waves(module.weight, shift=1)


def plain() -> nn.Module:
    """The model to train, drawn from torch's global generator."""
    model = new_model()
    initialise(model)
    return model


def task(args: argparse.Namespace, model: nn.Module) -> diffusion.Task:
    """A model of the shipped shape, and the training images."""
    images, labels = fashion_mnist.load(args.data, "train")
    return diffusion.Task(model, images, labels, lambda chosen: {"class_labels": chosen})


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = diffusion.arguments(description, steps=9_000, batch=64, log_every=100)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's gzipped IDX files")
    return parser


def main() -> None:
    diffusion.train(arguments(__doc__).parse_args(), lambda args: task(args, plain()))


if __name__ == "__main__":
    main()
