"""Retrofit the shipped plain DiT with long skip connections, or train it on for as long without them (the control).

    python training/image_retrofit.py --data FOLDER --out runs/image_retrofit --export FILE.safetensors
    python training/image_retrofit.py --data FOLDER --out runs/image_control --export FILE.safetensors --control
    python training/image_retrofit.py --data FOLDER --out runs/image_distilled --export FILE.safetensors --distill 1
    python training/image_retrofit.py --data FOLDER --out runs/image_bounded --export FILE.safetensors --bound 0.1

All start from the package's weights and see the same images, noise and timesteps. A control's file holds the plain model's
weights, and that of bounded fusions what they multiply by, so that it is read like any retrofit's. A training can be stopped and
started again at any time.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import diffusion
import image_dit
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

import cachekit
from cachekit import Distillation, Stage
from cachekit.bounded import BoundedLinear
from cachekit.demo import fashion
from cachekit.fusions import Spectral

# The plain model's own training drew from the seeds of its steps; here come others.
FIRST_STEP = 1_000_000


def start(args: argparse.Namespace) -> nn.Module:
    """The shipped model with fusions; residual ones, which change nothing as long as they are not trained, for a control."""
    model = fashion.load_model()
    for name, module in model.named_modules():
        if name.endswith("timestep_embedder.linear_1"):
            diffusion.leave_out_short_waves(module.weight, shift=1)
    fusion = args.fusion if args.bound is None else partial(Spectral, bound=args.bound)
    return cachekit.add_long_skips(model, fusion="residual" if args.control else fusion, seed=args.seed)


def stages(args: argparse.Namespace) -> list[Stage]:
    """The fusions, then everything; a control trains what was there before for as many steps."""
    if args.control:
        return [Stage(steps=args.fusions + args.everything, train="original", lr=args.lr)]
    distill = Distillation(output=args.distill, features=args.distill) if args.distill else None
    return [
        Stage(steps=args.fusions, train="fusions", lr=5 * args.lr, distill=distill),
        Stage(steps=args.everything, train="all", lr=args.lr, distill=distill),
    ]


def multiplied_by(model: nn.Module) -> nn.Module:
    """A model whose bounded layers' weights are what they multiply by."""
    for module in model.modules():
        if isinstance(module, BoundedLinear):
            module.weight.data.copy_(module.bounded.detach())
    return model


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    task = image_dit.task(args, start(args))
    noising = DDPMScheduler(beta_schedule="linear")

    def data(step: int) -> tuple[dict[str, Any], Tensor]:
        clean, labels, noise, t = diffusion.batch(task, args.batch, args.seed, FIRST_STEP + step)
        return {"hidden_states": noising.add_noise(clean, noise, t), "timestep": t, **task.conditions(labels)}, noise

    model = cachekit.retrofit(
        task.model,
        data,
        stages=stages(args),
        seed=args.seed,
        ema=0.998,
        clip=1.0,
        checkpoint=args.out / "checkpoint.pt",
        log=args.out / "log.jsonl",
        log_every=args.log_every,
        save_every=250,
    )
    if args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        kept = cachekit.remove_long_skips(model) if args.control else multiplied_by(model)
        save_file({key: value.half().contiguous() for key, value in kept.state_dict().items()}, args.export)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with Fashion-MNIST's gzipped IDX files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and log.jsonl")
    parser.add_argument("--export", type=Path, help="write the averaged weights here, in half precision")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--control", action="store_true", help="no long skip connections: the plain model, trained on for as long")
    kind.add_argument("--fusion", default="residual", help="residual, paper or spectral")
    kind.add_argument("--bound", type=float, help="residual fusions with this bound on their largest singular values")
    parser.add_argument("--distill", type=float, default=0.0, help="weight of the original's predictions, and of its deep features")
    parser.add_argument("--fusions", type=int, default=500, help="steps for the fusions alone")
    parser.add_argument("--everything", type=int, default=1_500, help="steps for all weights")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-4, help="of everything; the fusions alone take five times as much")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    args = parser.parse_args()
    if args.control and args.distill:
        parser.error("a control learns from the data alone; leave --distill out")
    train(args)


if __name__ == "__main__":
    main()
