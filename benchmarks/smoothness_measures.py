"""How smooth a model is: along a generation, and under perturbed weights (the explanation in Skip-DiT, arXiv 2411.17616).

Everything is measured on the uncached model, sample by sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cachekit.adapter import adapter_for
from cachekit.main_stream import main_output
from cachekit.pairs import stack_units
from cachekit.tree import arguments

Values = NDArray[np.float64]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Dynamics:
    """How blocks' outputs differ from those of the step before.

    Attributes:
        blocks: paths, in the order of the stack.
        change: ||h_i - h_{i-1}|| / ||h_{i-1}||, shape (samples, steps - 1, blocks); 0 where both are zero.
        cosine: of h_i and h_{i-1}, same shape; 1 where both are zero.
    """

    blocks: tuple[str, ...]
    change: Values
    cosine: Values


def stack_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of the stack's blocks, in the order in which units run them."""
    return tuple(block for unit in stack_units(model, adapter_for(model)) for block in unit)


@dataclass
class _Watched:
    """The blocks' outputs of the step before, and what was found so far: a list of (samples,) for each block."""

    batch: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)
    change: dict[str, list[Tensor]] = field(default_factory=dict)
    cosine: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, block: str, output: Tensor) -> None:
        # Latte's frames and tokens lie in the batch, but behind the samples: each sample's features stay in one piece.
        now = output.detach().reshape(self.batch, -1).double().clone()
        before = self.before.get(block)
        if before is not None:
            change, cosine = compared(now, before)
            self.change.setdefault(block, []).append(change)
            self.cosine.setdefault(block, []).append(cosine)
        self.before[block] = now


def compared(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Relative change and cosine of each row, (n, d) and (n, d) -> (n,) and (n,). Two rows of zeros are alike."""
    norms, moved = before.norm(dim=1), (now - before).norm(dim=1)
    product = norms * now.norm(dim=1)
    alike = (now == before).all(dim=1)
    change = torch.where(alike, 0.0, moved / norms)
    return change, torch.where(alike, 1.0, (now * before).sum(dim=1) / product.clamp_min(torch.finfo(now.dtype).tiny))


def dynamics(model: nn.Module, generate: Callable[[], Any]) -> Dynamics:
    """Watch one uncached generation.

    Args:
        model: what the generation calls, once a step.
        generate: runs it.

    Raises:
        ValueError: the model holds no stack, was called only once, or a block was not called.
    """
    blocks, seen = stack_of(model), _Watched()
    if not blocks:
        raise ValueError(f"no stack of blocks was found in {type(model).__name__}; blocks stand in ModuleLists")

    def open_step(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.batch = len(arguments(args, kwargs)[0][1])

    main = adapter_for(model).main
    with ExitStack() as hooks, torch.inference_mode():
        hooks.callback(model.register_forward_pre_hook(open_step, with_kwargs=True).remove)
        for name in blocks:

            def note(_: nn.Module, args: Any, kwargs: Any, result: Any, name: str = name) -> None:
                seen.add(name, main_output(name, main, args, kwargs, result))

            hooks.callback(model.get_submodule(name).register_forward_hook(note, with_kwargs=True).remove)
        generate()
    if seen.change.keys() != set(blocks):
        raise ValueError("the generation must call every block at two steps at least; give more steps")
    found = [torch.stack([torch.stack(kind[name], 1) for name in blocks], 2).numpy() for kind in (seen.change, seen.cosine)]
    return Dynamics(blocks, *found)


def recorded(model: nn.Module, generate: Callable[[], Any], count: int) -> list[Call]:
    """The arguments of ``count`` calls of a model, spread evenly over a generation, the first and last among them."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))

    with ExitStack() as hooks, torch.inference_mode():
        hooks.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        generate()
    chosen = np.linspace(0, len(calls) - 1, min(count, len(calls))).round().astype(int)
    return [calls[k] for k in chosen]


def direction(parameters: Sequence[Tensor], rng: torch.Generator) -> list[Tensor]:
    """A random direction, scaled to each parameter's norm. Weights that are exactly zero are held there and stay."""
    found = []
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter) * (parameter != 0)
        norm = drawn.norm()
        found.append(drawn * (parameter.norm() / norm) if norm > 0 else drawn)
    return found


@contextmanager
def perturbed(parameters: Sequence[Tensor], steps: Sequence[tuple[float, Sequence[Tensor]]]) -> Iterator[None]:
    """theta + the sum of (factor, direction), and afterwards theta again, bit for bit."""
    saved = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for factor, along in steps:
            for parameter, part in zip(parameters, along, strict=True):
                parameter.add_(part, alpha=factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


def landscape(model: nn.Module, calls: Sequence[Call], seed: int, grid: Sequence[float]) -> Values:
    """Cosine of the perturbed prediction with the original one: theta' = theta + a d1 + b d2.

    Args:
        model: an uncached one.
        calls: arguments of the calls that are compared.
        seed: of the two directions.
        grid: values of a, and of b.

    Returns:
        Mean over calls and samples, shape (len(grid), len(grid)), a first.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    rng = torch.Generator().manual_seed(seed)
    first, second = direction(parameters, rng), direction(parameters, rng)
    with torch.no_grad():
        originals = [_predicted(model, call) for call in calls]
        found = np.empty((len(grid), len(grid)))
        for i, a in enumerate(grid):
            for j, b in enumerate(grid):
                with perturbed(parameters, [(a, first), (b, second)]):
                    cosines = [compared(_predicted(model, call), y)[1] for call, y in zip(calls, originals, strict=True)]
                found[i, j] = float(torch.cat(cosines).mean())
    return found


def _predicted(model: nn.Module, call: Call) -> Tensor:
    args, kwargs = call
    result = model(*args, **kwargs)
    return arguments((result,), {})[0][1].flatten(1).double()
