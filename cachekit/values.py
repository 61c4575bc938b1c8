"""The value vectors of a block's self-attention, for reuses that choose tokens by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from cachekit.errors import ConfigError

# What each reuse makes of one tensor of value vectors: a number for each token, by the reuse's identity.
Measured = dict[int, Tensor]


class Measuring(Protocol):
    """A reuse that chooses tokens by a number that it makes of their value vectors, and gets back when it chooses."""

    @property
    def measures(self) -> bool:
        """Whether it does; where not, ``measure`` is never called."""
        ...

    def measure(self, values: Tensor) -> Tensor:
        """A number for each token.

        Args:
            values: (batch, tokens, heads, width), one head where their number is unknown.

        Returns:
            (batch, tokens); kept in float32, or float64 where the values are.
        """
        ...


def measures(reuse: Any) -> TypeGuard[Measuring]:
    """Whether a reuse looks at value vectors."""
    return bool(getattr(reuse, "measures", False))


@dataclass(frozen=True)
class Projection:
    """A layer within an attention module that makes value vectors.

    Attributes:
        parts: of its output, one behind the other, of which values are the last: queries and keys may stand before them.
        head: width of a head; None where it is unknown.
    """

    parts: int
    head: int | None

    def values(self, returned: Any) -> Tensor | None:
        """(batch, tokens, heads, width) of what the layer returned; None where that is not (batch, tokens, ...)."""
        if not isinstance(returned, Tensor) or returned.ndim != 3 or not returned.is_floating_point():
            return None
        values = returned.detach().chunk(self.parts, dim=-1)[-1]
        return torch.unflatten(values, -1, (-1, self.head or values.shape[-1]))


def projections(attention: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, Projection]]:
    """The layers of these names in an attention module that make its value vectors.

    One whose name has qkv in it, or kv, is taken where it makes three times the width that it takes, or twice; others have
    another layout.
    """
    for path, layer in attention.named_modules():
        prefix, _, name = path.rpartition(".")
        if name not in names or not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
            continue
        parts = 3 if "qkv" in name.lower() else 2 if "kv" in name.lower() else 1
        if parts > 1 and layer.out_features != parts * layer.in_features:
            continue
        # The width of a head is that of queries; of keys and values there may be fewer heads.
        query = getattr(attention.get_submodule(prefix), name.replace("value", "query").replace("v", "q"), None)
        width = layer.in_features if parts > 1 else getattr(query, "out_features", None)
        yield layer, Projection(parts, _head(attention, width, layer.out_features // parts))


def _head(attention: nn.Module, queries: Any, values: Any) -> int | None:
    heads = getattr(attention, "heads", getattr(attention, "num_heads", None))
    if not isinstance(heads, int) or not isinstance(queries, int) or heads < 1 or queries % heads:
        return None
    return queries // heads if values % (queries // heads) == 0 else None


class Measures:
    """What reuses make of the value vectors that the calls of a model's modules show, one call after the other.

    Attributes:
        found: of the last call, in the order in which they were made.
    """

    def __init__(self, reuses: Iterable[Any]) -> None:
        self._reuses = {id(reuse): reuse for reuse in reuses if measures(reuse)}
        self.found: list[Measured] = []

    def begin(self) -> None:
        """Another call begins."""
        self.found = []

    def show(self, values: Tensor) -> None:
        """The call makes value vectors: what is made of them is made at once, since it may write into them.

        Raises:
            ConfigError: a reuse makes something else than a number for each token.
        """
        wide = torch.promote_types(values.dtype, torch.float32)
        self.found.append({key: reuse.measure(values).to(wide) for key, reuse in self._reuses.items()})
        for key, numbers in self.found[-1].items():
            if numbers.shape != values.shape[:2]:
                raise ConfigError(
                    f"{self._reuses[key]!r}.measure() made {tuple(numbers.shape)} of values {tuple(values.shape)}; "
                    "return a number for each token, (batch, tokens)"
                )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(batch, tokens) of each of the call's."""
        return tuple(tuple(numbers.shape) for measured in self.found for numbers in [*measured.values()][:1])
