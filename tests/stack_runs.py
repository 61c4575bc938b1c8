"""Generations of random stacks: what they start from, and how a sampler would go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from stack_blocks import StackSpec
from stacks import CHANNELS, CONTEXT, Stack, build, calls
from torch import Tensor


def given_time(spec: StackSpec, t: float, batch: int) -> Any:
    """A timestep in the form that the spec's sampler gives it."""
    if spec.time == "number":
        return t
    if spec.time == "scalar":
        return torch.tensor(t)
    return torch.full((batch,), t if spec.time == "float" else int(t), dtype=torch.float32 if spec.time == "float" else torch.int64)


def conditioning(spec: StackSpec, batch: int, seed: int) -> Tensor:
    """Labels (B,), or a context (B, CONTEXT, D)."""
    generator = torch.Generator().manual_seed(seed)
    if spec.signature == "t":
        return torch.randint(0, 10, (batch,), generator=generator)
    return torch.randn(batch, CONTEXT, spec.width, generator=generator)


def noise(spec: StackSpec, batch: int, seed: int, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, N, CHANNELS)."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch, tokens or spec.tokens, CHANNELS, generator=generator).to(dtype)


def tensor_of(output: Any) -> Tensor:
    """The prediction out of whatever holds it."""
    if isinstance(output, dict):
        output = output["sample"]
    elif isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return output


def advance(x: Tensor, prediction: Tensor, gap: float) -> Tensor:
    """The next sample: never the same again, and never turned by more than a sampler would."""
    return x - (0.02 + 0.3 * abs(gap) / 1000) * torch.tanh(prediction.to(x.dtype) + 1)


@dataclass(frozen=True)
class Run:
    """One generation to be made: the timesteps, what it starts from, what it is conditioned on."""

    times: tuple[float, ...]
    seed: int = 0
    batch: int = 2
    tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def steps(self, model: Stack) -> Iterator[Tensor]:
        """Each step's prediction; the sample moves on by it."""
        spec = model.spec
        x, y = noise(spec, self.batch, self.seed, self.tokens, self.dtype), conditioning(spec, self.batch, self.seed)
        following = (*self.times[1:], 0.0)
        for t, after in zip(self.times, following, strict=True):
            prediction = tensor_of(model(x, given_time(spec, t, self.batch), y))
            yield prediction.clone()
            x = advance(x, prediction, t - after)

    def outputs(self, model: Stack) -> list[Tensor]:
        """The predictions of all steps."""
        with torch.no_grad():
            return list(self.steps(model))


def calls_of_one(spec: StackSpec) -> list[int]:
    """How often each block runs in one call of the unwrapped model."""
    model = build(spec)
    Run((500.0,)).outputs(model)
    return calls(model)


def start(model: Stack, run: Run, steps: int) -> None:
    """Some steps of a generation that is then given up."""
    with torch.no_grad():
        for _ in islice(run.steps(model), steps):
            pass


def samples(model: Stack, run: Run) -> list[Tensor]:
    """The samples of a generation, to be given whatever is predicted."""
    x, found = noise(model.spec, run.batch, run.seed, run.tokens, run.dtype), []
    for t, prediction in zip(run.times, run.outputs(model), strict=True):
        found.append(x)
        x = advance(x, prediction, t / 4)
    return found


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two generations are the same bit by bit."""
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
