"""Small transformers that no adapter describes, with modules under unusual names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CONTEXT = 8, 6


class Mixer(nn.Module):
    """Attention by what it does; its class and the name that it gets say so or not."""

    def __init__(self, context: int = WIDTH) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(context, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, dim=-1)
        scores = self.q(x) @ k.mT
        scores = scores if mask is None else scores + mask
        return self.out(scores.softmax(-1) @ v)  # type: ignore[no-any-return]


class JointAttention(Mixer):
    """Two sequences in, two out."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        both = super().forward(torch.cat([x, y], dim=1))
        return both[:, : x.shape[1]], both[:, x.shape[1] :]


class Gated(nn.Module):
    """An MLP whose layers are not in the order of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down, self.up = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).sigmoid() * self.up(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + tanh(self-attention), + cross-attention, + MLP, as built from the given modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.modulation = nn.Sequential(nn.Linear(WIDTH, 6), nn.SiLU(), nn.Linear(6, WIDTH))
        for name, module in modules.items():
            self.add_module(name, module)
        self.order = tuple(modules)
        self.skips: set[str] = set()

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        x = x + self.modulation(x.mean(1))[:, None]
        for name in self.order:
            if name in self.skips:
                continue
            module = self.get_submodule(name)
            given: tuple[Any, ...] = (self.norm(x),)
            if isinstance(module, JointAttention):
                given = (given[0], torch.nn.functional.pad(memory, (0, WIDTH - memory.shape[-1])))
            elif isinstance(module, Mixer):
                given = (given[0], memory) if module.kv.in_features == CONTEXT else (given[0], None, mask)
            elif isinstance(module, nn.MultiheadAttention):
                given = given * 3
            found = module(*given)
            x = x + (found[0] if isinstance(found, tuple) else found)
        return x


class Toy(nn.Module):
    """Blocks in a list; ``forward(x, t, memory)``."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[0], x.shape[1], x.shape[1])
        for block in self.blocks:
            x = block(x * (1 + t / 1000), memory, mask)
        return x


def toy(depth: int = 3, **kinds: Any) -> Toy:
    """A toy whose blocks hold what these make, by name."""
    torch.manual_seed(0)
    return Toy(*(Block(**{name: make() for name, make in kinds.items()}) for _ in range(depth))).eval()


def usual(depth: int = 3) -> Toy:
    """A toy with self-attention, cross-attention and MLP under the usual names."""
    return toy(depth, attn=Mixer, cross_attn=lambda: Mixer(CONTEXT), mlp=Gated)


def inputs(tokens: int = 5, memory: int = 4) -> tuple[Tensor, Tensor]:
    """A sample, and what it is conditioned on."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, WIDTH, generator=generator), torch.randn(2, memory, CONTEXT, generator=generator)


def sample(model: nn.Module, times: Any = (900.0, 800.0, 600.0, 500.0), **sizes: int) -> list[Tensor]:
    """The predictions of one generation; each step's sample follows from the prediction before."""
    x, memory = inputs(**sizes)
    found = []
    with torch.no_grad():
        for t in times:
            found.append(model(x, torch.tensor(t), memory).clone())
            x = x + 0.05 * found[-1]
    return found
