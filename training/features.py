"""Train the small classifier in whose features `cachekit compare` measures distances to real images: a minute or two.

    python training/features.py --data FOLDER --export cachekit/demo/weights/features.safetensors --log training/logs/features.jsonl

It is trained on the 60,000 training images. The export holds its weights and the features of 1,000 test images, 100 of each class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fashion_mnist
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cachekit.demo.frechet import new_classifier


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels and flipped at random, as a real one might be."""
    padded = nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    dx, dy = torch.randint(0, 5, (2,), generator=rng).tolist()
    moved = padded[:, :, dy : dy + 28, dx : dx + 28]
    return moved.flip(3) if torch.rand((), generator=rng) < 0.5 else moved


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = new_classifier()
    images, labels = fashion_mnist.load(args.data, "train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    rng = torch.Generator().manual_seed(args.seed)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    total = 0.0
    with args.log.open("w") as log:
        for step in range(min(args.steps, args.until)):
            index = torch.randint(len(images), (256,), generator=rng)
            loss = nn.functional.cross_entropy(model(shifted(images[index], rng)), labels[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
            if (step + 1) % 50 == 0:
                log.write(json.dumps({"step": step + 1, "loss": round(total / 50, 5)}) + "\n")
                log.flush()
                total = 0.0
        if args.export:
            accuracy = export(model, args)
            log.write(json.dumps({"test accuracy": round(accuracy, 4)}) + "\n")


@torch.no_grad()
def export(model: nn.Sequential, args: argparse.Namespace) -> float:
    """Write weights and real features, in half precision; returns the accuracy on the test images."""
    model.eval()
    weights = {key: value.half() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    images, labels = fashion_mnist.load(args.data, "t10k")
    accuracy = float((torch.cat([model(part).argmax(1) for part in images.split(1000)]) == labels).float().mean())
    chosen = torch.cat([(labels == k).nonzero()[:100, 0] for k in range(10)])
    save_file({**weights, "real": model[:-1](images[chosen]).half().contiguous()}, args.export)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's gzipped IDX files")
    parser.add_argument("--export", type=Path, help="write weights and real features here")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--until", type=int, default=10**9, help="stop early at this step (to reproduce the log's start)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
