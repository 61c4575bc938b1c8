"""The errors by which a calibration disturbs one step at a time, to see what becomes of each in the final sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cachekit.errors import ConfigError
from cachekit.measures import Matrix
from cachekit.reuse import Forecast

# A final sample answers errors in different directions by different amounts, and what forecasts are off by lies within these three
# directions for the most part (measured in docs/plans-measured.md).
ORDERS = (0, 1, 2)


def probe(order: int) -> Forecast:
    """What is reused at the one step; one step behind three others order 2 has weights of 7 in all, over the default bound."""
    return Forecast(order, bound=12.0, axis="grid")


def distinct(orders: Sequence[int], i: int) -> list[int]:
    """Which of the orders are probes of their own at timestep i, where the order is bounded by the values that there are."""
    at_most = [min(order, i - 1) for order in orders]
    return [k for k, order in enumerate(at_most) if i and order not in at_most[:k]]


def errors(orders: Sequence[int], i: int, n: int) -> Matrix:
    """The probes' errors at timestep i of n as weights of the site's values, (orders, n): the value less its forecast.

    Zeros for an order that is none of its own.
    """
    found = np.zeros((len(orders), n))
    for k in distinct(orders, i):
        last = list(range(i - 1, -1, -1))[: orders[k] + 1]
        found[k, i] = 1.0
        found[k, last] -= probe(orders[k]).weights([float(j) for j in last], float(i))
    return found


def check_orders(orders: Sequence[int]) -> tuple[int, ...]:
    """Orders of the probes.

    Raises:
        ConfigError: there is none, one twice, or one that is none of ``ORDERS``.
    """
    found = tuple(orders) if isinstance(orders, Sequence) else ()
    if not found or len(set(found)) < len(found) or any(order not in ORDERS for order in found):
        raise ConfigError(f"probes={orders!r}: give some of the orders {', '.join(map(str, ORDERS))}, each once, such as (1,)")
    return found
