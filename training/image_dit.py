"""Train the class-conditional DiT that cachekit ships: Fashion-MNIST, noise prediction, two cores, about an hour.

    python training/image_dit.py --data FOLDER --out runs/image_dit --export cachekit/demo/weights/fashion_dit.safetensors

It can be stopped and started again at any time. Step k draws its batch from a generator seeded by (seed, k), so that a
resumed run sees the same data as one that was never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import fashion_mnist
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cachekit.demo.fashion import new_model

# The shortest wave of the timestep embedding that the model may use, in timesteps. Shorter ones start as noise that training
# does not remove: with all of them, predictions on fine schedules differed from step to step by one to three per cent that no
# finer schedule made smaller, while the images predicted from changed smoothly.
SHORTEST_WAVE = 400.0


def initialise(model: nn.Module) -> None:
    """DiT's own initialisation, but for three things that make it learn faster or smoother: see the comments."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # DiT's std of .02 leaves the class invisible next to the timestep for the first thousands of steps.
            nn.init.normal_(module.weight, std=1.0)
    for name, module in model.named_modules():
        if name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
            nn.init.zeros_(module.weight)
        elif name.endswith("timestep_embedder.linear_1"):
            leave_out_short_waves(module.weight)


def leave_out_short_waves(weight: nn.Parameter) -> None:
    """Keep the columns of short waves at zero, for good: their gradients are too, and there is no other force on them."""
    half = weight.shape[1] // 2
    waves = 2 * math.pi * 10_000 ** (torch.arange(half) / (half - 1))  # diffusers' Timesteps: cosines, then sines
    kept = (waves >= SHORTEST_WAVE).float().repeat(2)
    with torch.no_grad():
        weight.mul_(kept)
    weight.register_hook(lambda gradient: gradient * kept)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch(images: Tensor, labels: Tensor, size: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, classes, noise and timesteps of one step; the timesteps are stratified over the whole range."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(images), (size,), generator=rng)
    noise = torch.randn(size, *images.shape[1:], generator=rng)
    t = ((torch.arange(size) + torch.rand(size, generator=rng)) * (1000 / size)).long().clamp(max=999)
    return images[index], labels[index], noise, t


def plain(args: argparse.Namespace) -> nn.Module:
    """The model to train, drawn from torch's global generator."""
    model = new_model()
    initialise(model)
    return model


def train(args: argparse.Namespace, make: Callable[[argparse.Namespace], nn.Module] = plain) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = make(args)
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    images, labels = fashion_mnist.load(args.data, "train")
    noising = DDPMScheduler(beta_schedule="linear")
    checkpoint, start = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        ema, start = saved["ema"], saved["step"]
    total, count = 0.0, 0
    with (args.out / "log.jsonl").open("a") as log:
        for step in tqdm(range(start, min(args.steps, args.until)), initial=start, total=args.steps):
            clean, y, noise, t = batch(images, labels, args.batch, args.seed, step)
            lr = learning_rate(step, args.steps, args.lr)
            for group in optimiser.param_groups:
                group["lr"] = lr
            predicted = model(noising.add_noise(clean, noise, t), t, class_labels=y).sample
            loss = (predicted - noise).square().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            # A fixed decay would average over the random start for the first thousands of steps.
            decay = min(0.9995, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
            total, count = total + loss.item(), count + 1
            if (step + 1) % 100 == 0:
                log.write(json.dumps({"step": step + 1, "loss": round(total / count, 5), "lr": round(lr, 7)}) + "\n")
                log.flush()
                total, count = 0.0, 0
            if (step + 1) % args.checkpoints == 0 or step + 1 == args.steps:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema, "step": step + 1}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
    if args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in ema.items()}, args.export)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's gzipped IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and log.jsonl")
    parser.add_argument("--export", type=Path, help="write the averaged weights here, in half precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=9_000, help="length of the learning-rate schedule")
    parser.add_argument("--until", type=int, default=10**9, help="stop early at this step (to reproduce the log's start)")
    parser.add_argument("--checkpoints", type=int, default=500, help="steps from one checkpoint to the next")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser


def main() -> None:
    train(arguments(__doc__).parse_args())


if __name__ == "__main__":
    main()
