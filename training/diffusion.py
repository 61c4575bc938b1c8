"""What the diffusion trainings share: one loop for every model, its options, and how weights start.

A training can be stopped and started again at any time. Step k draws its batch from a generator seeded by (seed, k), so that a
resumed run sees the same data as one that was never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cachekit.training_log import TrainingLog

# The shortest wave of the timestep embedding that a model may use, in timesteps. Shorter ones start as noise that training
# does not remove: with all of them, predictions on fine schedules differed from step to step by one to three per cent that no
# finer schedule made smaller, while the images predicted from changed smoothly.
SHORTEST_WAVE = 400.0
# Of the error of a predicted sample, which next to the data would count without bound: as in the authors' code, whose denominator
# stops at 0.05 of the way.
MOST_WEIGHT = 20.0


@dataclass(frozen=True)
class Task:
    """A model and what it learns.

    Attributes:
        model: ``model(noisy, t, **conditions).sample`` is the prediction.
        clean, labels: of the training data, shapes (n, ...) and (n,).
        conditions: from labels (batch,) to the model's other arguments.
        scaled: from rows of ``clean`` to the range -1 ... 1.
        predicts: ``"noise"``, or ``"sample"``: the clean data (Li and He, arXiv 2511.13720). Its error is weighted as the
            velocity's would be, by 1 / (1 - a) with a = alphas_cumprod[t] (Salimans and Ho, arXiv 2202.00512, appendix D), up to
            ``MOST_WEIGHT``.
    """

    model: nn.Module
    clean: Tensor
    labels: Tensor
    conditions: Callable[[Tensor], dict[str, Any]]
    scaled: Callable[[Tensor], Tensor] = lambda rows: rows
    predicts: Literal["noise", "sample"] = "noise"


def initialise(model: nn.Module) -> None:
    """DiT's own initialisation of linear layers and embeddings, but for the embeddings' size: see the comment."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # DiT's std of .02 leaves the class invisible next to the timestep for the first thousands of steps.
            nn.init.normal_(module.weight, std=1.0)


def leave_out_short_waves(weight: nn.Parameter, shift: int) -> None:
    """Keep the columns of short waves at zero, for good: their gradients are too, and there is no other force on them.

    Args:
        weight: of the linear layer behind diffusers' ``Timesteps``: cosines, then sines.
        shift: that class's ``downscale_freq_shift``.
    """
    half = weight.shape[1] // 2
    waves = 2 * math.pi * 10_000 ** (torch.arange(half) / (half - shift))
    kept = (waves >= SHORTEST_WAVE).float().repeat(2)
    with torch.no_grad():
        weight.mul_(kept)
    weight.register_hook(lambda gradient: gradient * kept)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 300) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def batch(task: Task, size: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean data, labels, noise and timesteps of one step; the timesteps are stratified over the whole range."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(task.clean), (size,), generator=rng)
    noise = torch.randn(size, *task.clean.shape[1:], generator=rng)
    t = ((torch.arange(size) + torch.rand(size, generator=rng)) * (1000 / size)).long().clamp(max=999)
    return task.scaled(task.clean[index]), task.labels[index], noise, t


class Run:
    """A training under way: what its checkpoint holds, and how a step changes it."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args, self.step = task, args, 0
        # Of the steps since the last line of the log.
        self.losses: list[float] = []
        self.ema = {key: value.clone() for key, value in task.model.state_dict().items()}
        self.optimiser = torch.optim.AdamW(task.model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.noising = DDPMScheduler(beta_schedule="linear")
        self.checkpoint: Path = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            task.model.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.ema, self.step, self.losses = saved["ema"], saved["step"], saved.get("losses", [])

    def advance(self) -> tuple[float, float]:
        """One step; returns its loss and learning rate."""
        model, args, step = self.task.model, self.args, self.step
        clean, labels, noise, t = batch(self.task, args.batch, args.seed, step)
        lr = learning_rate(step, args.steps, args.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        predicted = model(self.noising.add_noise(clean, noise, t), t, **self.task.conditions(labels)).sample
        loss = self.loss(predicted, clean, noise, t)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimiser.step()
        # A fixed decay would average over the random start for the first thousands of steps.
        decay = min(0.9995, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            self.ema[key].lerp_(value, 1 - decay)
        self.step += 1
        return loss.item(), lr

    def loss(self, predicted: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.task.predicts == "noise":
            return (predicted - noise).square().mean()
        weight = (1 / (1 - self.noising.alphas_cumprod[t])).clamp(max=MOST_WEIGHT)
        return (weight * (predicted - clean).square().flatten(1).mean(1)).mean()

    def save(self) -> None:
        """All that the steps to come depend on, written beside the old checkpoint and then put in its place."""
        state = {
            "model": self.task.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "ema": self.ema,
            "step": self.step,
            "losses": self.losses,
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)


def train(args: argparse.Namespace, make: Callable[[argparse.Namespace], Task]) -> None:
    """Train what ``make`` returns, as the options of ``arguments`` say. ``make`` draws weights from torch's global generator."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    run = Run(make(args), args)
    TrainingLog(args.out / "log.jsonl", None).start(run.step)
    with (args.out / "log.jsonl").open("a") as log:
        for _ in tqdm(range(run.step, min(args.steps, args.until)), initial=run.step, total=args.steps):
            loss, lr = run.advance()
            run.losses.append(loss)
            if run.step % args.log_every == 0:
                mean = sum(run.losses) / len(run.losses)
                log.write(json.dumps({"step": run.step, "loss": round(mean, 5), "lr": round(lr, 7)}) + "\n")
                log.flush()
                run.losses.clear()
            if run.step % args.checkpoints == 0 or run.step == args.steps:
                run.save()
    if args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in run.ema.items()}, args.export)


def arguments(description: str | None, *, steps: int, batch: int, log_every: int) -> argparse.ArgumentParser:
    """The options of every training; the defaults given are those of the shipped model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint.pt and log.jsonl")
    parser.add_argument("--export", type=Path, help="write the averaged weights here, in half precision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help="length of the learning-rate schedule")
    parser.add_argument("--until", type=int, default=10**9, help="stop early at this step (to reproduce the log's start)")
    parser.add_argument("--checkpoints", type=int, default=500, help="steps from one checkpoint to the next")
    parser.add_argument("--log-every", type=int, default=log_every, help="steps from one line of the log to the next")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser
