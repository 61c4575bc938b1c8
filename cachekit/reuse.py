"""What a reused site returns: a forecast from a short history of what was computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, replace
from itertools import zip_longest
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic.dataclasses import dataclass as validated

from cachekit.errors import ConfigError
from cachekit.policy import STRICT, Step
from cachekit.spec import known_reuses, make

Axis = Literal["t", "grid"] | Callable[[float], float]
Blend = Annotated[float, Field(ge=0.0, lt=1.0)]


@runtime_checkable
class Reuse(Protocol):
    """How a reused value is made from the history of a site.

    Attributes:
        length: how many past values are kept (one tensor each).
        beta: what is kept is ``output - beta * input``; on reuse ``beta`` times the fresh input is added again.
    """

    @property
    def length(self) -> int: ...

    @property
    def beta(self) -> float: ...

    def time(self, step: Step) -> float:
        """Where a step stands on the axis along which values are forecast."""
        ...

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """One weight for each past value, newest first; missing ones count as zero."""
        ...


def lagrange(times: Sequence[float], t: float) -> list[float]:
    """Weights that extrapolate any polynomial of degree ``len(times) - 1`` exactly, at any spacing of distinct nodes."""
    result = []
    for j, node in enumerate(times):
        weight = 1.0
        for k, other in enumerate(times):
            if k != j:
                weight *= (t - other) / (node - other)
        result.append(weight)
    return result


@validated(frozen=True, config=STRICT)
class Forecast:
    """Polynomial forecast from true nodes; order 0 holds the newest value.

    Lagrange's weights keep their order on uneven nodes, which a recursion of differences (arXiv 2503.06923) does not. ``beta``
    is the share of the input's own change that is passed on: 0 reuses the output, 1 the residual (arXiv 2406.01125).

    Args:
        order: degree of the polynomial; lowered while the history is shorter, or while the sum of the weights' absolute
            values passes ``bound`` (a long gap after a dense stretch amplifies the values' errors by that sum).
        beta: input correction, 0 to 1.
        bound: largest sum of absolute weights for an order above 0.
        axis: the polynomial's variable. ``"t"``: the timestep. ``"grid"``: the position on the sampler's own grid of timesteps,
            which is t where the grid is even in t, and the log-SNR where it is even in that (docs/compare.md has both measured).
            A function: what it makes of the timestep, different for different ones.
        blend: share of the forecast of one order more, below 1; the rest is the forecast of ``order``. Where one falls short and
            the other overshoots, what lies between is nearer than either. Each is lowered for itself, as ``order`` is.
    """

    order: NonNegativeInt = 0
    _: KW_ONLY
    beta: NonNegativeFloat = 0.0
    bound: PositiveFloat = 5.0
    axis: Axis = "t"
    blend: Blend = 0.0

    @property
    def highest(self) -> int:
        """The highest order that is used."""
        return self.order + (self.blend > 0)

    @property
    def length(self) -> int:
        return self.highest + 1

    def time(self, step: Step) -> float:
        """The step's timestep, its index among the different timesteps so far, or the axis' function of its timestep."""
        if callable(self.axis):
            return self.axis(step.t)
        return step.t if self.axis == "t" else float(step.node)

    def weights(self, times: Sequence[float], t: float) -> list[float]:
        """One weight for each time used, newest first, and none for older ones."""
        order, below = self._bounded(self.order, times, t)
        if not self.blend:
            return below
        higher, above = self._bounded(self.highest, times, t)
        # Two equal ones are not mixed: rounding would spoil a weight of one.
        if higher == order:
            return below
        return [b + self.blend * (a - b) for a, b in zip_longest(above, below, fillvalue=0.0)]

    def rival(self, times: Sequence[float], t: float) -> list[float] | None:
        """Weights of the order below the one in use, or of order 1 where that is 0; None where there are too few values.

        What the two forecasts differ by is an estimate of their error that needs no further value.
        """
        if len(times) == 1 or t == times[0]:
            return None
        order = self._bounded(self.order, times, t)[0]
        return [1.0] if order == 1 else self.of_order(order - 1 if order else 1, times, t)

    def _bounded(self, most: int, times: Sequence[float], t: float) -> tuple[int, list[float]]:
        """The highest order up to so much that the history and the bound allow, and its weights."""
        if t != times[0]:
            for order in range(min(most, len(times) - 1), 0, -1):
                result = self.of_order(order, times, t)
                if sum(map(abs, result)) <= self.bound:
                    return order, result
        return 0, [1.0]

    def of_order(self, order: int, times: Sequence[float], t: float) -> list[float]:
        """The weights of one order of at least 1, for more times than that, t not the newest; subclasses override this."""
        return lagrange(times[: order + 1], t)


ADVICE = (
    "write 'output', 'residual', 'taylor-K', 'residual-taylor-K' (K = 1, 2, ...), 'grid-taylor-K', "
    "'residual-grid-taylor-K' or cachekit.Forecast(order=..., beta=..., bound=..., axis=..., blend=...)"
)


def parse_reuse(reuse: Any) -> Reuse:
    """A spec string such as ``"output"`` or ``"taylor-2"``, or an object that follows ``Reuse``.

    Before any name, ``residual-`` passes on what the input changed (``beta=1``), and ``grid-`` forecasts along the sampler's
    grid; together they are ``residual-grid-``, in either order.

    Returns:
        What follows ``Reuse``; its ``length`` says how many tensors will be held for each that is stored.

    Raises:
        ConfigError: anything else; known names are listed.
    """
    if isinstance(reuse, str):
        name, changes = reuse, dict[str, Any]()
        left: dict[str, dict[str, Any]] = {"residual-": {"beta": 1.0}, "grid-": {"axis": "grid"}}
        while prefix := next((prefix for prefix in left if name.startswith(prefix)), ""):
            name, changes = name.removeprefix(prefix), changes | left.pop(prefix)
        made = make(name, known_reuses(), kind="reuse", advice=ADVICE)
        lacking = [change for change in changes if change not in getattr(made, "__dataclass_fields__", ())]
        if lacking:
            raise ConfigError(f"reuse={reuse!r}: {name!r} has no {' and no '.join(lacking)} to set; write {name!r} alone")
        reuse = replace(made, **changes) if changes else made
    if isinstance(reuse, Reuse) and not isinstance(reuse, type):
        if not isinstance(reuse.length, int) or reuse.length < 1:
            raise ConfigError(f"{reuse!r}.length is {reuse.length!r}: how many values are kept, a whole number of at least one")
        if not math.isfinite(reuse.beta):
            raise ConfigError(f"{reuse!r}.beta is {reuse.beta!r}: the share of the input that is added again, a finite number")
        return reuse
    raise ConfigError(f"unknown reuse {reuse!r}; {ADVICE}")
