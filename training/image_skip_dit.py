"""Train a Skip-DiT of the shipped shape from scratch: as image_dit.py, with long skip connections from the start.

    python training/image_skip_dit.py --data FOLDER --out runs/image_skip_dit --export FILE.safetensors

The weights fit ``cachekit.add_long_skips(cachekit.demo.fashion.new_model(), fusion="paper")``. Data, schedule and initialisation of
the blocks are those of image_dit.py with the same seed, so that the two differ by the fusions alone.
"""

from __future__ import annotations

import argparse

import diffusion
import image_dit

import cachekit


def with_long_skips(args: argparse.Namespace) -> diffusion.Task:
    """The plain model's own weights, then the fusions'."""
    return image_dit.task(args, cachekit.add_long_skips(image_dit.plain(), fusion=args.fusion))


def main() -> None:
    parser = image_dit.arguments(__doc__)
    parser.add_argument("--fusion", default="paper", help="paper, residual or spectral")
    diffusion.train(parser.parse_args(), with_long_skips)


if __name__ == "__main__":
    main()
