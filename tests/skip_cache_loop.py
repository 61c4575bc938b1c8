"""Skip-Cache (arXiv 2411.17616, section 3.2) as a plain loop from its description, which knows nothing of cachekit.

The cached object is the state that enters unit L-k, before its fusion. A full step runs everything and stores that state. A
cached step runs units 0 ... k-1, puts the stored state in as the input of unit L-k, fuses it with the fresh long skip of unit
k-1, and runs units L-k ... L-1. A step is full if ``count % n == 0``, or nothing is stored, or ``t >= start``. The count
advances on every step; after a step with ``t < close`` count and store are cleared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import History, forecast, remember
from torch import Tensor, nn
from torch.nn import functional

from cachekit import Forecast


@dataclass(frozen=True)
class Rule:
    """When: "N{n}-{start}-{close}"; where: the outermost k units on both sides run; how: order 0 holds."""

    n: int
    k: int
    start: float
    close: float
    order: int = 0

    @property
    def policy(self) -> str:
        return f"N{self.n}-{self.start:g}-{self.close:g}"


@dataclass
class Counter:
    """The rule's state in one generation."""

    rule: Rule
    count: int = 0
    t: float = 0.0
    stored: History = field(default_factory=list)

    def full(self, t: float) -> bool:
        """Whether the step at t is a full one; asked once, before it."""
        self.t = t
        return self.count % self.rule.n == 0 or not self.stored or t >= self.rule.start

    def store(self, state: Tensor) -> None:
        remember(self.stored, self.t, state.clone())

    def restore(self) -> Tensor:
        return forecast(self.stored, self.t, Forecast(self.rule.order)) if self.rule.order else self.stored[0][1]

    def close(self) -> None:
        """After the step."""
        self.count += 1
        if self.t < self.rule.close:
            self.count, self.stored = 0, []


def paper(weights: dict[str, Tensor], x: Tensor, skip: Tensor) -> Tensor:
    """The paper's fusion, from a state dict with ``norm.*`` and ``linear.*``."""
    joined = torch.cat([x, skip], dim=-1)
    normed = functional.layer_norm(
        joined.float(), joined.shape[-1:], weights["norm.weight"].float(), weights["norm.bias"].float(), 1e-6
    )
    return functional.linear(normed.to(x.dtype), weights["linear.weight"], weights["linear.bias"])


class Loop:
    """One generation of a model whose blocks are called one by one, each with the state as its first argument.

    Args:
        model: neither wrapped nor given long skips by cachekit; its blocks are patched.
        units: the blocks' paths by unit.
        rule: Skip-Cache's; None runs every step in full.
        fusions: for each late unit, the state dict of its fusion with unit L-1-u; none where the model has its own.
        batch: number of videos, where a unit is a spatial and a temporal block.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Sequence[str]],
        rule: Rule | None,
        fusions: dict[int, dict[str, Tensor]],
        batch: int = 1,
    ) -> None:
        self.model, self.units, self.fusions, self.batch = model, units, fusions, batch
        self.counter = Counter(rule or Rule(1, 0, float("inf"), 0.0))
        self.is_full = True
        self.ran: list[str] = []
        self.outputs: dict[int, Tensor] = {}
        for u, paths in enumerate(units):
            for path in paths:
                block = model.get_submodule(path)
                block.__dict__["forward"] = functools.partial(self._visit, u, path, block.forward)

    def __call__(self, t: float, **inputs: Any) -> Any:
        """The prediction of the next step."""
        self.is_full, self.ran, self.outputs = self.counter.full(t), [], {}
        result = self.model(**inputs)
        self.counter.close()
        return result

    def _visit(self, u: int, path: str, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        last, k = len(self.units), self.counter.rule.k
        if not self.is_full and k <= u < last - k:
            return x
        if path == self.units[u][0]:
            if u == last - k and self.is_full:
                self.counter.store(x)
            elif u == last - k:
                x = self.counter.restore()
            if u in self.fusions:
                x = paper(self.fusions[u], x, self._as_it_enters(self.outputs[last - 1 - u], x))
        self.ran.append(path)
        result = original(x, *args, **kwargs)
        if path == self.units[u][-1]:
            self.outputs[u] = result
        return result

    def _as_it_enters(self, skip: Tensor, x: Tensor) -> Tensor:
        """A unit's output in the spatial layout, rearranged as the models do it."""
        if len(self.units[0]) == 1:
            return skip
        return skip.reshape(self.batch, -1, skip.shape[-2], skip.shape[-1]).permute(0, 2, 1, 3).reshape(x.shape)
