"""Caching as slow and as plain as can be, to compare the real one with.

A stack is known by its description, not discovered. Every visit in a segment keeps all of its outputs from all steps, and on a
reused step each returns the forecasts of its own: what only the next block of the segment would have seen changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

from hypothesis import assume
from stack_blocks import ARGUMENTS, Block
from stack_runs import tensor_of
from stacks import Stack, linked, visits_of
from torch import Tensor

from cachekit import Forecast
from cachekit.policy import Policy, Step
from cachekit.signals import Signal

History = list[tuple[float, Tensor]]


def exact_weights(nodes: Sequence[float], t: float) -> list[Fraction]:
    """Lagrange's weights, in exact fractions."""
    found = []
    for j, node in enumerate(nodes):
        weight = Fraction(1)
        for k, other in enumerate(nodes):
            weight *= 1 if k == j else Fraction(t - other) / Fraction(node - other)
        found.append(weight)
    return found


def expected_weights(order: int, bound: float, nodes: Sequence[float], t: float) -> list[float]:
    """The weights that a bounded forecast must use, newest node first: of the highest order that the bound allows.

    Where rounding decides whether the bound does, the example is left out.
    """
    for k in range(min(order, len(nodes) - 1), 0, -1):
        weights = exact_weights(nodes[: k + 1], t)
        size = sum(abs(w) for w in weights)
        assume(abs(float(size) - bound) > 1e-9)
        if size <= bound:
            return [float(w) for w in weights]
    return [1.0]


def remember(history: History, now: float, value: Tensor) -> None:
    """Add a value at the front; a second one at the same time takes the first one's place."""
    if history and history[0][0] == now:
        history.pop(0)
    history.insert(0, (now, value))


def forecast(history: History, now: float, reuse: Forecast) -> Tensor:
    """The value of a polynomial through the newest entries of a history, or what lies between two of them."""
    below = through(history, now, reuse.order, reuse.bound)
    if not reuse.blend:
        return below
    return below + reuse.blend * (through(history, now, reuse.order + 1, reuse.bound) - below)


def through(history: History, now: float, order: int, bound: float) -> Tensor:
    """The value of one polynomial."""
    weights = expected_weights(order, bound, [time for time, _ in history[: order + 1]], now)
    total = weights[0] * history[0][1]
    for weight, (_, value) in zip(weights[1:], history[1:], strict=False):
        total = total + weight * value
    return total


@dataclass
class Site:
    """One segment (no visits: the whole prediction), its decision of this step, and all that it remembers."""

    visits: Sequence[int]
    policy: Policy[Any]
    reuse: Forecast
    state: Any = None
    recomputed: bool | None = None
    then: dict[str, Tensor] = field(default_factory=dict)
    entry: dict[str, Tensor] = field(default_factory=dict)
    histories: dict[tuple[int, str], History] = field(default_factory=dict)


class Reference:
    """One generation of a model, cached so.

    Args:
        model: not wrapped; its blocks are patched.
        sites: where to reuse.
        steps: the number of steps, where a session would know it.
    """

    def __init__(self, model: Stack, sites: Sequence[Site], steps: int | None) -> None:
        self.model, self.sites, self.steps = model, sites, steps
        self.linked = linked(model.spec)
        self.owner = {v: site for site in sites for v in site.visits}
        self.i, self.node, self.v = -1, 0, 0
        self.batch = 1
        self.t, self.previous_t = 0.0, 0.0
        self.residuals: dict[int, Tensor] = {}
        self.entered: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        for site in sites:
            site.state = site.policy.init()
        for block in dict.fromkeys(visits_of(model)):
            block.__dict__["forward"] = functools.partial(self._visit, block, block.forward)

    def __call__(self, t: float, *args: Any) -> Tensor:
        """The prediction of the next step, at t, for a model's arguments (sample, timestep, conditioning)."""
        self.node += self.i >= 0 and t != self.t
        self.i, self.v, self.t, self.previous_t = self.i + 1, 0, t, self.t
        self.batch = len(args[0])
        for site in self.sites:
            site.recomputed, site.entry = None, {}
        prediction = self._predict(args)
        for site in self.sites:
            if site.recomputed is not None:
                site.state = site.policy.update(site.state, self._step(site), site.recomputed)
            if site.recomputed and site.visits:
                site.then = self._shown(site)
        return prediction

    def _predict(self, args: tuple[Any, ...]) -> Tensor:
        whole = next((site for site in self.sites if not site.visits), None)
        if whole is None:
            return tensor_of(self.model(*args))
        if self._decide(whole):
            found = tensor_of(self.model(*args))
            remember(whole.histories.setdefault((-1, ""), []), self._now(whole), found - whole.reuse.beta * args[0])
            return found
        added: Tensor = whole.reuse.beta * args[0]
        return forecast(whole.histories[-1, ""], self._now(whole), whole.reuse) + added

    def _visit(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        v, self.v = self.v, self.v + 1
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        entering = {"x": given["hidden_states"].clone()}
        if given.get("encoder_hidden_states") is not None:
            entering["c"] = given["encoder_hidden_states"].clone()
        site = self.owner.get(v)
        if site is not None and not (self.linked[v] and self.owner.get(v - 1) is site):
            site.entry = entering
        if site is None or self._decide(site):
            values = block.shape.unpack(result := original(*args, **kwargs))
            if site is not None:
                self._store(site, v, values)
        else:
            values = {"c": None, "hint": given.get("hint"), **self._reused(site, v)}
            result = block.shape.pack(values)
        self.residuals[v] = values["x"] - entering["x"]
        self.entered[v], self.left[v] = entering["x"], values["x"].clone()
        return result

    def _store(self, site: Site, v: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if value is not None and name != "hint":
                kept = value - site.reuse.beta * site.entry[name] if name in site.entry else value.clone()
                remember(site.histories.setdefault((v, name), []), self._now(site), kept)

    def _reused(self, site: Site, v: int) -> dict[str, Tensor]:
        found = {}
        for (visit, name), history in site.histories.items():
            if visit == v:
                value = forecast(history, self._now(site), site.reuse)
                found[name] = value + site.reuse.beta * site.entry[name] if name in site.entry else value
        return found

    def _decide(self, site: Site) -> bool:
        if site.recomputed is None:
            site.recomputed = self.i == 0 or site.policy.decide(site.state, self._step(site))
        return site.recomputed

    def _step(self, site: Site) -> Step:
        before = self.previous_t if self.i else None
        return Step(self.i, self.t, self.steps, None, before, self.node, look=functools.partial(self._look, site))

    def _shown(self, site: Site) -> dict[str, Tensor]:
        """The residuals before a site: of one block, and of all those since the model last did something between two."""
        last = site.visits[0] - 1
        if last < 0:
            return {}
        start = last
        while self.linked[start]:
            start -= 1
        return {"probe": self.residuals[last], "front": self.left[last] - self.entered[start]}

    def _look(self, site: Site, signal: Signal) -> Any:
        """The largest of the samples' changes; where the stream has several rows for each, they lie one behind the other."""
        now, then = self._shown(site)[signal.of], site.then[signal.of]
        each = len(now) // self.batch
        found = []
        for start in range(0, len(now), each):
            a, b = now[start : start + each], then[start : start + each]
            found.append(float((a - b).abs().mean() / b.abs().mean()))
        return SimpleNamespace(relative=max(found))

    def _now(self, site: Site) -> float:
        axis = site.reuse.axis
        if callable(axis):
            return axis(self.t)
        return self.t if axis == "t" else float(self.node)
