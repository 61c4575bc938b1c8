"""Train the class-conditional Latte on clips of vizdoom, plain or with long skip connections: one core, an hour and a half.

    python training/video_latte.py --data runs/clips.npz --out runs/video_latte --export FILE.safetensors
    python training/video_latte.py --data runs/clips.npz --out runs/video_skip --long-skips paper --export FILE.safetensors

The clips are made where ``--data`` is missing (needs the extra ``training``). The weights fit
``cachekit.demo.clips.new_model()``, with the same long skip connections added. Data, schedule and initialisation of the blocks are
the same with and without them, so that models of one seed differ by the fusions alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusion
import vizdoom_clips
from torch import nn

import cachekit
from cachekit.demo import clips


def initialise(model: nn.Module) -> None:
    """As every model here; blocks start as the identity, the output at zero, and short waves are left out."""
    diffusion.initialise(model)
    for name, module in model.named_modules():
        if name in ("proj_out", "adaln_single.linear") or name.endswith("attn2.to_out.0"):
            nn.init.zeros_(module.weight)
        elif name.endswith("timestep_embedder.linear_1"):
            diffusion.leave_out_short_waves(module.weight, shift=0)
        elif name == "caption_projection.linear_1":
            # One-hot captions make it a table of class embeddings; xavier would make them small.
            nn.init.normal_(module.weight, std=1.0)


def model_for(args: argparse.Namespace) -> nn.Module:
    """The plain model's own weights, then the fusions'."""
    model = clips.new_model()
    initialise(model)
    return model if args.long_skips is None else cachekit.add_long_skips(model, fusion=args.long_skips)


def task(args: argparse.Namespace) -> diffusion.Task:
    data, labels = vizdoom_clips.load(args.data, vizdoom_clips.settings_from(args))
    # A quarter of the memory of floats, so that only the batch becomes one.
    scale = 1 / 127.5
    return diffusion.Task(
        model_for(args),
        data,
        labels,
        conditions=lambda chosen: {"encoder_hidden_states": clips.caption(chosen)},
        scaled=lambda rows: rows.float() * scale - 1,
        # A patch has 48 values for a stream of 128: clean ones fill few of these dimensions, noise and velocities all of them.
        predicts="sample",
    )


def options() -> argparse.ArgumentParser:
    parser = diffusion.arguments(__doc__, steps=8_000, batch=4, log_every=20)
    parser.add_argument("--data", type=Path, required=True, help="the clips' .npz, made where there is none")
    parser.add_argument("--long-skips", choices=("paper", "residual", "spectral"), help="the fusion; plain if left out")
    vizdoom_clips.add_arguments(parser)
    return parser


def main() -> None:
    diffusion.train(options().parse_args(), task)


if __name__ == "__main__":
    main()
