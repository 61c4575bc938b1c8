"""What wrapping costs, against code written by hand that skips the same blocks.

    python benchmarks/overhead.py            # DiT-XL/2's shape and a small one, about twelve minutes on two cores
    python benchmarks/overhead.py --only small

Every figure is a ratio of medians (or a difference of them) over calls that were timed in turn in one process, so that a machine
whose speed drifts slows both sides alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cachekit


@dataclass(frozen=True)
class Shape:
    name: str
    depth: int
    width: int
    heads: int
    tokens: int
    batch: int
    rounds: int


SHAPES = (
    Shape("DiT-XL/2 (28 blocks, width 1152, 256 tokens)", 28, 1152, 16, 256, 1, 15),
    Shape("small (28 blocks, width 64, 16 tokens)", 28, 64, 4, 16, 1, 300),
)


class Block(nn.Module):
    """DiT's block with adaLN-Zero (arXiv 2212.09748): x (batch, tokens, width), c (batch, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Stack(nn.Module):
    """Blocks between an embedding and a head, as in DiT."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, shape.width), nn.Linear(shape.width, 16)
        self.time = nn.Linear(1, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(t.float().reshape(-1, 1) / 1000).expand(len(x), -1)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


class HandWritten(Stack):
    """The same, with the middle blocks' output held by hand every ``period`` steps."""

    period, count = 1, 0
    held: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.embed(x), self.time(t.float().reshape(-1, 1) / 1000).expand(len(x), -1)
        h = self.blocks[0](h, c)
        if self.count % self.period == 0 or self.held is None:
            for block in self.blocks[1:-1]:
                h = block(h, c)
            self.held = h
        else:
            h = self.held
        self.count += 1
        return self.head(self.blocks[-1](h, c))


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all of them once a round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 2):
        order = list(calls.items())
        for name, call in order[k % len(order) :] + order[: k % len(order)]:
            start = time.perf_counter()
            call()
            if k >= 2:
                times[name].append(time.perf_counter() - start)
    return times


class Steps:
    """Calls a model with falling timesteps within one explicit generation, one call a time."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x, self.t = model, x, 1e6

    def __call__(self) -> None:
        self.t -= 1
        self.model(self.x, torch.tensor([self.t]))


def generation(model: nn.Module, x: Tensor, steps: int) -> Callable[[], None]:
    def run() -> None:
        if isinstance(model, HandWritten):
            model.count, model.held = 0, None
        for k in range(steps):
            # The sample moves a little, as a sampler moves it.
            model(x + 0.01 * k, torch.tensor([999.0 - k * 999 / steps]))

    return run


def twins(shape: Shape) -> tuple[Stack, HandWritten, Stack]:
    """A plain stack, the hand-written one and one to wrap, with equal weights."""
    torch.manual_seed(0)
    plain, by_hand, wrapped = Stack(shape), HandWritten(shape), Stack(shape)
    by_hand.load_state_dict(plain.state_dict())
    wrapped.load_state_dict(plain.state_dict())
    return plain.eval(), by_hand.eval(), wrapped.eval()


def report(shape: Shape) -> None:
    x = torch.randn(shape.batch, shape.tokens, 16)
    plain, by_hand, model = twins(shape)
    cachekit.wrap(model, cachekit.policies.every(1))
    with model.cachekit.session():
        full = in_turn({"plain": Steps(plain, x), "every(1)": Steps(model, x)}, shape.rounds)
    by_hand.period = 10**9
    cachekit.wrap(model, cachekit.policies.first(1))
    with model.cachekit.session():
        cached = in_turn({"by hand": Steps(by_hand, x), "cachekit": Steps(model, x)}, shape.rounds * 3)
    mid = {name: statistics.median(times) for name, times in {**full, **cached}.items()}
    print(f"\n{shape.name}")
    print(f"  full step     {mid['plain'] * 1e3:9.2f} ms   every(1) costs {mid['every(1)'] / mid['plain'] - 1:+.2%}")
    print(f"  reused step   {mid['by hand'] * 1e3:9.2f} ms   cachekit costs {mid['cachekit'] / mid['by hand'] - 1:+.2%} over it")
    per_full = (mid["every(1)"] - mid["plain"]) / shape.depth * 1e6
    per_reused = (mid["cachekit"] - mid["by hand"]) / shape.depth * 1e6
    print(f"  per block     {per_full:9.1f} us recomputed, {per_reused:.1f} us reused (the step's own cost shared out)")
    for period in (2, 3, 4):
        by_hand.period = period
        cachekit.wrap(model, cachekit.policies.every(period))
        runs = {"plain": generation(plain, x, 12), "by hand": generation(by_hand, x, 12), "cachekit": generation(model, x, 12)}
        seconds = {name: statistics.median(times) for name, times in in_turn(runs, max(3, shape.rounds // 5)).items()}
        stats = model.cachekit.stats
        allowed = stats.blocks_total / stats.blocks_run
        speedup, hand = seconds["plain"] / seconds["cachekit"], seconds["plain"] / seconds["by hand"]
        print(
            f"  every({period})      {speedup:.3f}x, by hand {hand:.3f}x, {allowed:.3f}x by the count of blocks: "
            f"{speedup / allowed:.1%} of it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only the shapes whose name holds this text")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        for shape in SHAPES:
            if args.only in shape.name:
                report(shape)


if __name__ == "__main__":
    main()
