"""A small model with its calls in the form in which samplers make them: what every case of a real architecture is given as."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Conditioning = dict[str, Any]
_MODULATION = re.compile(r".*(norm\w*|adaln\w*)\.linear\.bias")


@dataclass(frozen=True)
class Shape:
    """What a conditioning depends on: batch size, dtype, and the factor on height and width."""

    batch: int = 2
    dtype: torch.dtype = torch.float32
    scale: int = 1


@dataclass(frozen=True)
class Case:
    """A model and its calls.

    Attributes:
        name: class name of the model.
        make: builds the model with torch's global generator.
        timestep: (t in the scheduler's units, shape) -> the argument that the pipeline would pass.
        latent: (height and width at scale 1) -> the sample's shape without the batch.
        condition: (draw, shape) -> every other argument; ``draw(*size)`` gives normal numbers of the right dtype.
        stack: the blocks' paths in the order of their calls.
        long_skips: (early, late) indices of blocks of ``stack``.
        names: of the sample's and the timestep's argument.
        unit: how many blocks of ``stack`` segments count as one.
    """

    name: str
    make: Callable[[], nn.Module]
    timestep: Callable[[float, Shape], Tensor]
    latent: Callable[[int], tuple[int, ...]]
    condition: Callable[[Callable[..., Tensor], Shape], Conditioning]
    stack: tuple[str, ...]
    long_skips: tuple[tuple[int, int], ...] = ()
    names: tuple[str, str] = ("hidden_states", "timestep")
    unit: int = 1

    def build(self, seed: int = 0) -> Any:
        """A model in evaluation mode, typed so that any attribute may be asked for.

        Equal seeds give equal weights; torch's global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return stir(self.make(), seed).eval()

    def conditioning(self, seed: int = 0, shape: Shape | None = None) -> Conditioning:
        """Everything but sample and timestep. Keep it over a generation: pipelines pass the same objects at every step."""
        shape = shape or Shape()
        generator = torch.Generator().manual_seed(10_000 + seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(shape.dtype)

        return self.condition(draw, shape)

    def sample(self, t: float, seed: int = 0, shape: Shape | None = None, start: float = 1000.0) -> Tensor:
        """The noisy sample at t on a straight path from noise (at ``start``) to data, so that neighbours are alike.

        Returns:
            Tensor of the shape that ``latent`` gives, with the batch in front.
        """
        shape = shape or Shape()
        generator = torch.Generator().manual_seed(seed)
        size = (shape.batch, *self.latent(8 * shape.scale))
        noise, data = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
        return (noise * (t / start) + data * (1 - t / start)).to(shape.dtype)

    def inputs(
        self,
        t: float,
        batch: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        scale: int = 1,
        conditioning: Conditioning | None = None,
        start: float = 1000.0,
    ) -> dict[str, Any]:
        """Keyword arguments of one call of ``forward``.

        Args:
            t: timestep in the scheduler's units.
            batch, dtype, scale: see ``Shape``.
            seed: of the trajectory and of the conditioning.
            conditioning: from ``conditioning()``; without one it is made anew, with equal values.
            start: the timestep at which the sample is pure noise.
        """
        shape = Shape(batch, dtype, scale)
        rest = self.conditioning(seed, shape) if conditioning is None else conditioning
        sample, timestep = self.names
        return {sample: self.sample(t, seed, shape, start), timestep: self.timestep(t, shape), **rest}

    def output(self, result: Any) -> Tensor:
        """The prediction in what ``forward`` returned."""
        if isinstance(result, Tensor):
            return result
        found: Tensor = result["x"] if isinstance(result, dict) and "x" in result else result[0]
        return found

    def __str__(self) -> str:
        return self.name


def stir(model: nn.Module, seed: int) -> nn.Module:
    """Give random values to all that training starts at zero, and to the modulations' biases: else blocks hardly matter."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not bool(parameter.any()):
                fan = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if fan > 1 else 0.2) / fan**0.5)
            elif _MODULATION.fullmatch(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    return float(torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()))


def whole(t: float, shape: Shape) -> Tensor:
    """An integer, expanded over the batch."""
    return torch.tensor([round(t)]).expand(shape.batch)


def floating(t: float, shape: Shape) -> Tensor:
    """A single-precision number, expanded over the batch."""
    return torch.tensor([t], dtype=torch.float32).expand(shape.batch)


def own_dtype(t: float, shape: Shape) -> Tensor:
    """One number for each of the batch, in the sample's dtype."""
    return torch.tensor([t] * shape.batch).to(shape.dtype)


def thousandth(t: float, shape: Shape) -> Tensor:
    """t / 1000 in the sample's dtype, as flow-matching pipelines pass it."""
    return floating(t, shape).to(shape.dtype) / 1000


def image(channels: int) -> Callable[[int], tuple[int, ...]]:
    """(channels, height, width)."""
    return lambda size: (channels, size, size)


def video(channels: int, frames: int = 3) -> Callable[[int], tuple[int, ...]]:
    """(channels, frames, height, width)."""
    return lambda size: (channels, frames, size, size)


def paths(name: str, count: int) -> tuple[str, ...]:
    """The blocks of one list."""
    return tuple(f"{name}.{k}" for k in range(count))
