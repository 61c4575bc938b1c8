"""Runs small models over generations, counts and watches their blocks: what the tests on real architectures share."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from cases import Case, Shape
from torch import Tensor, nn
from zoo import CASES, DIT, FLUX, HUNYUAN_DIT, LATTE

TIMES = (900.0, 700.0, 500.0, 300.0)
SCHEDULE = tuple(float(t) for t in range(950, 0, -150))
SEGMENTS: tuple[Any, ...] = ("middle", "all", (1, 3), "model")

# One of each kind: one stream; glue between its blocks; long skips; two streams that become one.
QUICK = (DIT, LATTE, HUNYUAN_DIT, FLUX)

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)


def generate(
    model: nn.Module,
    case: Case,
    times: Sequence[float],
    seed: int = 0,
    shape: Shape | None = None,
    start: float | None = None,
    prompt: int | None = None,
) -> list[Tensor]:
    """The predictions of one generation over samples that don't depend on the model, with one conditioning throughout.

    ``seed`` is that of the samples, and of the conditioning too unless ``prompt`` is given.
    """
    shape = shape or Shape()
    conditioning = case.conditioning(seed if prompt is None else prompt, shape)
    # A generation starts from pure noise, whatever its first timestep; a part of one starts where the whole did.
    start = times[0] if start is None else start
    return [
        case.output(model(**case.inputs(t, shape.batch, seed, shape.dtype, shape.scale, conditioning, start))).clone()
        for t in times
    ]


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], label: str = "") -> None:
    """Bit-equality, step by step."""
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.equal(b), f"{label or 'step'} {step} differs by up to {(a - b).abs().max()}"


def segment_paths(case: Case, segment: Any) -> tuple[str, ...]:
    """The blocks that a segment covers, counted here by hand: Latte's in pairs."""
    ranges = {"middle": (1, len(case.stack) // case.unit - 1), "all": (0, len(case.stack)), "model": (0, len(case.stack))}
    start, stop = ranges[segment] if isinstance(segment, str) else segment
    return case.stack[start * case.unit : stop * case.unit]


def ran(model: Any) -> tuple[bool, ...]:
    """Which blocks the last step of a wrapped model ran."""
    found: tuple[bool, ...] = model.cachekit.stats.records[-1].recomputed
    return found


def _counted(calls: Counter[str], path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    calls[path] += 1
    return original(*args, **kwargs)


def count_forwards(model: nn.Module, case: Case) -> Counter[str]:
    """Count the calls of every block's own forward; to be called before wrap."""
    calls: Counter[str] = Counter()
    for path in case.stack:
        block = model.get_submodule(path)
        block.__dict__["forward"] = functools.partial(_counted, calls, path, block.forward)
    return calls


Seen = list[tuple[str, list[Tensor], list[Tensor]]]


@contextmanager
def watching(model: nn.Module, paths: Sequence[str], seen: Seen) -> Iterator[None]:
    """Collect (path, inputs, result) of these blocks, as the model passes and gets them."""

    def see(path: str, block: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        results = result if isinstance(result, tuple) else (result,)
        seen.append((path, tensors, [value.clone() for value in results if isinstance(value, Tensor)]))

    hooks = [model.get_submodule(path).register_forward_hook(functools.partial(see, path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
