"""Guidance as pipelines have it, and FasterCache's rebuilding of the unconditional pass written out in loops.

Nothing of the library is used but the cases' models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from cases import Case, Shape
from naive_modules import Held, paths
from torch import Tensor

DOUBLE = torch.float64
# (step, timestep) -> whether both passes run.
Both = Callable[[int, float], bool]
# (stored difference, timestep) -> the difference at this step.
Carry = Callable[[Tensor, float], Tensor]


def batch_of(case: Case, t: float, n: int, start: float, dtype: torch.dtype = DOUBLE, seed: int = 0) -> dict[str, Any]:
    """The arguments of a call with both passes over n samples, and so the very same samples in either half."""
    shape = Shape(2 * n, dtype)
    sample = case.sample(t, seed, Shape(n, dtype), start)
    return {case.names[0]: torch.cat([sample, sample]), case.names[1]: case.timestep(t, shape)}


def half_of(given: Any, half: int, n: int) -> Any:
    """One half of every tensor of 2 n rows in arguments."""
    if isinstance(given, dict):
        return {name: half_of(value, half, n) for name, value in given.items()}
    if isinstance(given, Tensor) and given.ndim and len(given) == 2 * n:
        return given[half * n : half * n + n].contiguous()
    return given


def in_one_batch(
    case: Case, model: Any, times: Sequence[float], n: int, dtype: torch.dtype = DOUBLE, start: float | None = None
) -> list[Tensor]:
    """The predictions of a generation, or of a part of one that started earlier, with both passes in each call."""
    start = times[0] if start is None else start
    conditioning = case.conditioning(0, Shape(2 * n, dtype))
    return [case.output(model(**batch_of(case, t, n, start, dtype), **conditioning)).clone() for t in times]


def separately(
    case: Case,
    model: Any,
    times: Sequence[float],
    n: int,
    order: Callable[[int], Sequence[int]],
    name: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> list[list[Tensor]]:
    """The predictions of pass 0 (cond) and pass 1 (uncond), in separate calls on one sample object.

    Args:
        order: step -> which passes are called, and in which order.
        name: what a pass's calls are made within.
    """
    conditionings = [half_of(case.conditioning(0, Shape(2 * n, DOUBLE)), half, n) for half in (0, 1)]
    found: list[list[Tensor]] = [[], []]
    for i, t in enumerate(times):
        inputs = case.inputs(t, n, 0, DOUBLE, conditioning={}, start=times[0])
        for which in order(i):
            with name(which):
                found[which].append(case.output(model(**inputs, **conditionings[which])).clone())
    return found


def rebuilt(cond: Sequence[Tensor], uncond: Sequence[Tensor], times: Sequence[float], both: Both, carry: Carry) -> list[Tensor]:
    """The unconditional predictions, from those of an uncached model."""
    found, difference = [], None
    for i, (t, c, u) in enumerate(zip(times, cond, uncond, strict=True)):
        if difference is None or both(i, t):
            difference = u - c
            found.append(u)
        else:
            difference = carry(difference, t)
            found.append(c + difference)
    return found


def low_frequencies(image: Tensor) -> Tensor:
    """Those within a fifth of the smaller side of the middle of the spectrum, of one (height, width), summed up wave by wave."""
    height, width = image.shape
    spectrum = torch.fft.fft2(image.to(torch.complex128))
    radius, total = min(height, width) // 5, torch.zeros_like(image, dtype=torch.complex128)
    rows, columns = torch.arange(height, dtype=DOUBLE)[:, None], torch.arange(width, dtype=DOUBLE)[None]
    for u in range(height):
        for v in range(width):
            du, dv = (u if 2 * u < height else u - height), (v if 2 * v < width else v - width)
            if du * du + dv * dv <= radius * radius:
                total += spectrum[u, v] * torch.exp(2j * torch.pi * (u * rows / height + v * columns / width)) / height / width
    return total.real


def weighted(difference: Tensor, low: float, high: float) -> Tensor:
    """The difference with its low frequencies times one number, the others times another: each (height, width) on its own."""
    found = []
    for image in difference.reshape(-1, *difference.shape[-2:]):
        part = low_frequencies(image)
        found.append(low * part + high * (image - part))
    return torch.stack(found).reshape(difference.shape)


def published(difference: Tensor, t: float) -> Tensor:
    """With the weights that diffusers has: 1.1 within 99 < t < 901, and within -1 < t < 301."""
    return weighted(difference, 1.1 if 99 < t < 901 else 1.0, 1.1 if -1 < t < 301 else 1.0)


def with_attention_held(
    case: Case, model: Any, times: Sequence[float], n: int, half: int, attends: Both, share: Callable[[int, float], float]
) -> list[Tensor]:
    """The predictions of one pass alone, its attention's outputs on other steps F₀ + w (F₀ - F₁)."""
    step: dict[str, Any] = {}
    memory: dict[tuple[str, int, int], list[Tensor]] = {}

    def leaves(path: str, module: Any, args: Any, result: Any) -> Any:
        call = step["calls"][path] = step["calls"].get(path, -1) + 1
        returned = list(result) if isinstance(result, tuple) else [result]
        for k, tensor in enumerate(returned):
            values = memory.setdefault((path, call, k), [])
            if step["i"] == 0 or attends(step["i"], step["t"]):
                values.insert(0, tensor.clone())
            elif len(values) > 1:
                returned[k] = values[0] + share(step["i"], step["t"]) * (values[0] - values[1])
            else:
                returned[k] = values[0]
        return tuple(returned) if isinstance(result, tuple) else returned[0]

    conditioning, found = half_of(case.conditioning(0, Shape(2 * n, DOUBLE)), half, n), []
    with ExitStack() as hooks:
        for path in paths(case, model, Held("attn", attends)):
            hooks.callback(model.get_submodule(path).register_forward_hook(functools.partial(leaves, path)).remove)
        for i, t in enumerate(times):
            step.update(i=i, t=t, calls={})
            found.append(case.output(model(**case.inputs(t, n, 0, DOUBLE, conditioning=conditioning, start=times[0]))).clone())
    return found
