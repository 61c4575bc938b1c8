"""Find a model's stacks: lists of modules that are big enough to be blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from cachekit.adapter import Adapter
from cachekit.connections import LongSkips


def find_blocks(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """Candidate blocks by their path in the model. Which of them *are* blocks shows when they are called.

    A list inside a block (experts, feed-forward layers) is not a stack, so that the search ends at the first list on the
    way down. A list of single layers is none either.
    """
    pattern = re.compile(adapter.stack) if adapter.stack else None
    return {path: block for path, block in _search(model, "") if pattern is None or pattern.fullmatch(path)}


def _search(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, LongSkips):
            continue  # fusions run within blocks, whatever lists they hold
        if isinstance(child, nn.ModuleList | nn.Sequential) and _is_stack(child):
            for index, block in child.named_children():
                yield f"{path}.{index}", block
        else:
            yield from _search(child, f"{path}.")


def _is_stack(modules: nn.Module) -> bool:
    items = list(modules.children())
    if any(isinstance(item, nn.ModuleList) for item in items):
        return False  # never called itself: the blocks are further down
    return bool(items) and all(any(True for _ in item.children()) and any(True for _ in item.parameters()) for item in items)
