"""Add trainable long skip connections to any stack, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.blocks import find_blocks
from cachekit.connections import Connection, LongSkips
from cachekit.errors import ConfigError, ModelError
from cachekit.fusions import Factory, fusion_name, make_fusion
from cachekit.wrap import beneath

M = TypeVar("M", bound=nn.Module)
NAME = "long_skips"
Pairs = Sequence[tuple[int, int]]


def add_long_skips(
    model: M,
    *,
    fusion: str | Factory = "residual",
    pairs: Pairs | None = None,
    seed: int | None = None,
    width: int | None = None,
    adapter: Adapter | str | None = None,
) -> M:
    """Give a stack trainable long skip connections (Skip-DiT, arXiv 2411.17616).

    What block i returns is fused into what enters block L-1-i, before that block runs. Where an adapter groups blocks into
    units, units are counted, and the output of a unit enters the first block of another. The fusions are one submodule,
    ``model.long_skips``; every other key stays. A wrapped model forgets what it had stored.

    Args:
        model: any module that holds a stack; changed in place.
        fusion: ``"residual"``: x + Linear(LayerNorm([x ; skip])), zero at the start, so that nothing changes; ``"paper"``:
            Linear(LayerNorm([x ; skip])) with torch's initialisation; ``"spectral"``: residual with the linear layer's largest
            singular value kept at or below 1; or a callable (width) -> module that takes (x, skip), both (..., width).
        pairs: (early, late) units, counted in the order of the model's lists; None pairs i with L-1-i.
        seed: of the initialisation, which then leaves torch's global generator alone.
        width: of the streams; None reads it off each late block.
        adapter: as in ``wrap``.

    Returns:
        The same model.

    Raises:
        ConfigError: a fusion, pair or width that can't mean what was written.
        ModelError: no stack, long skip connections that are there already, or a model wrapped as a part of another.
    """
    _check_model(model)
    facts = adapter_for(model, adapter)
    units = stack_units(model, facts)
    chosen = default_pairs(len(units)) if pairs is None else _checked(pairs, len(units))
    made = LongSkips(fusion_name(fusion), chosen, tuple(_connection(model, units, pair, facts, width) for pair in chosen))
    with _seeded(seed):
        for connection in made.connections:
            late = model.get_submodule(connection.late)
            made[connection.name] = make_fusion(fusion, connection.width).to(**_placed_as(late))
    made.train(model.training)
    with beneath(model):
        _check_patches(model, made.connections)
        model.add_module(NAME, made)
        made.connect(model)
    return model


def remove_long_skips(model: M) -> M:
    """Take the long skip connections out again: every ``__dict__`` is as it was. A model without any stays as it is."""
    found = long_skips_of(model)
    if found is not None:
        with beneath(model):
            found.disconnect()
            del model._modules[NAME]
    return model


def long_skips_of(model: nn.Module) -> LongSkips | None:
    """The long skip connections that were added to a model."""
    found = model._modules.get(NAME) if isinstance(model, nn.Module) else None
    return found if isinstance(found, LongSkips) else None


def default_pairs(units: int) -> tuple[tuple[int, int], ...]:
    """(i, L-1-i) for the first half of L units."""
    return tuple((i, units - 1 - i) for i in range(units // 2))


def stack_units(model: nn.Module, adapter: Adapter) -> list[tuple[str, ...]]:
    """Paths of the blocks of each unit, in the order of the model's lists.

    Where there are as many lists as a unit has blocks, a unit takes one of each, as the model does.
    """
    paths = list(find_blocks(model, adapter))
    lists = [list(group) for _, group in groupby(paths, key=lambda path: path.rpartition(".")[0])]
    if adapter.unit > 1 and len(lists) == adapter.unit and len({len(found) for found in lists}) == 1:
        return list(zip(*lists, strict=True))
    return [tuple(paths[k : k + adapter.unit]) for k in range(0, len(paths), adapter.unit)]


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


def _connection(
    model: nn.Module, units: list[tuple[str, ...]], pair: tuple[int, int], adapter: Adapter, width: int | None
) -> Connection:
    early, late = units[pair[0]][-1], units[pair[1]][0]
    width = width_of(model.get_submodule(late), adapter) if width is None else width
    if width is None:
        raise ConfigError(f"block {late!r} has no norm or linear layer that tells its stream's width; give width=")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ConfigError(f"width={width!r}: the width of a stream is a whole number above 0")
    return Connection(f"{pair[0]}_to_{pair[1]}", early, late, width, adapter.relayouts(early, late), adapter.main)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no torch.nn.Module; give the transformer itself, for example pipe.transformer")
    if long_skips_of(model) is not None:
        raise ModelError("the model has long skip connections already; cachekit.remove_long_skips(model) first")
    if hasattr(model, NAME):
        raise ModelError(f"{type(model).__name__} has an attribute {NAME!r} of its own, where the fusions would go")
    for name, module in model.named_modules():
        if name and "cachekit" in module.__dict__:
            raise ModelError(f"its module {name!r} is wrapped; give that one, or cachekit.unwrap it first")


def _check_patches(model: nn.Module, connections: Iterable[Connection]) -> None:
    for late in (model.get_submodule(connection.late) for connection in connections):
        function = getattr(late.__dict__.get("forward"), "func", None)
        if getattr(function, "__module__", "") == "cachekit.engine":
            raise ModelError("the model is wrapped as a part of another module; cachekit.unwrap that one first")


def _checked(pairs: Any, units: int) -> tuple[tuple[int, int], ...]:
    try:
        found = tuple((int(early), int(late)) for early, late in pairs)
    except (TypeError, ValueError):
        raise ConfigError(f"pairs={pairs!r}; write a list of (early, late) indices, such as [(0, {units - 1})]") from None
    for early, late in found:
        if not 0 <= early < late < units:
            raise ConfigError(f"pair ({early}, {late}): the early one comes first, and both lie in this stack of {units}")
    lates = [late for _, late in found]
    if not found or len(set(lates)) < len(lates):
        raise ConfigError(f"pairs={pairs!r}; give at least one pair, and only one for each late block")
    return found


def _placed_as(block: nn.Module) -> dict[str, Any]:
    for parameter in block.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {}


class _seeded:
    """A seed for torch's CPU generator, which is as it was afterwards; None changes nothing."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self.fork: Any = nullcontext() if seed is None else torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self.fork.__enter__()
        if self.seed is not None:
            torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
