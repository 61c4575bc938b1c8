"""Which blocks long skip connections join: units in the order of a model's lists, pairs of them, and their width."""

from __future__ import annotations

from itertools import groupby
from operator import index
from typing import Any

from torch import nn

from cachekit.adapter import Adapter
from cachekit.blocks import find_blocks
from cachekit.errors import ConfigError

Pairs = tuple[tuple[int, int], ...]


def stack_units(model: nn.Module, adapter: Adapter) -> list[tuple[str, ...]]:
    """Paths of the blocks of each unit, in the order of the model's lists.

    Where there are as many lists as a unit has blocks, a unit takes one of each, as the model does.
    """
    paths = list(find_blocks(model, adapter))
    lists = [list(group) for _, group in groupby(paths, key=lambda path: path.rpartition(".")[0])]
    if adapter.unit > 1 and len(lists) == adapter.unit and len({len(found) for found in lists}) == 1:
        return list(zip(*lists, strict=True))
    return [tuple(paths[k : k + adapter.unit]) for k in range(0, len(paths), adapter.unit)]


def default_pairs(units: int) -> Pairs:
    """(i, L-1-i) for the first half of L units."""
    return tuple((i, units - 1 - i) for i in range(units // 2))


def checked_pairs(pairs: Any, units: int) -> Pairs:
    """Pairs as a user wrote them.

    Raises:
        ConfigError: they can't mean what was written.
    """
    try:
        found = tuple(sorted((index(early), index(late)) for early, late in pairs))
    except (TypeError, ValueError):
        raise ConfigError(f"pairs={pairs!r}; write a list of (early, late) indices, such as [(0, {units - 1})]") from None
    for early, late in found:
        if not 0 <= early < late < units:
            raise ConfigError(f"pair ({early}, {late}): the early one comes first, and both lie in this stack of {units}")
    lates = [late for _, late in found]
    if not found or len(set(lates)) < len(lates):
        raise ConfigError(f"pairs={pairs!r}; give at least one pair, and only one for each late block")
    return found


def width_of(block: nn.Module, adapter: Adapter) -> int | None:
    """Width of the stream that a block takes: what its attention's first linear layer does, else its first norm's or layer's."""
    attention = [module for name, module in block.named_children() if name in adapter.attention]
    for module in (inner for found in attention for inner in found.modules()):
        if isinstance(module, nn.Linear):
            return module.in_features
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        if isinstance(module, nn.Linear):
            return module.in_features
    return None
