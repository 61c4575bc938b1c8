"""Make the real features that `cachekit compare` measures distances to, EfficientNet-lite0's: a few minutes.

    python training/features_efficientnet.py --images FOLDER --export WEIGHTS/efficientnet_fashion.safetensors
    python training/features_efficientnet.py --test-clips runs/test.npz --export WEIGHTS/efficientnet_clips.safetensors

WEIGHTS is cachekit/demo/weights; needs the extras training and metrics. Of Fashion-MNIST's test images, or of clips of other games
than those of training, which are made where the file is missing. An export holds the centre and the principal components of all
their features, and 2,000 (or all) of the features themselves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fashion_mnist
import torch
import vizdoom_clips
from safetensors.torch import save_file
from torch import Tensor

from cachekit.demo.efficientnet import KINDS, principal

KEPT = 2_000


def stored(kind: str, samples: Tensor) -> dict[str, Tensor]:
    """What the export holds of one kind: samples as ``KINDS[kind]`` takes them, in the order in which some are kept."""
    features = torch.cat([KINDS[kind](part) for part in samples.split(250)])
    centre, components = principal(features)
    found = {"centre": centre, "components": components, "real": (features[:KEPT] - centre) @ components}
    return {f"{kind}.{key}": value.half().contiguous() for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder with Fashion-MNIST's gzipped IDX files")
    parser.add_argument("--test-clips", type=Path, help="the test clips' .npz, made where there is none")
    parser.add_argument("--export", type=Path, required=True)
    vizdoom_clips.add_arguments(parser)
    parser.set_defaults(clips=125)
    args = parser.parse_args()
    if (args.images is None) == (args.test_clips is None):
        parser.error("give one of --images and --test-clips")
    if args.images is not None:
        save_file(stored("images", fashion_mnist.load(args.images, "t10k")[0]), args.export)
        return
    clips, _ = vizdoom_clips.load(args.test_clips, vizdoom_clips.settings_from(args, "test"))
    # Scenario after scenario in the file; the same number of each among those that are kept.
    order = torch.arange(len(clips)).reshape(len(vizdoom_clips.SCENARIOS), -1).T.flatten()
    scaled = clips[order].float() / 127.5 - 1
    save_file({**stored("clips", scaled), **stored("motion", scaled)}, args.export)


if __name__ == "__main__":
    main()
