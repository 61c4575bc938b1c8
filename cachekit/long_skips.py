"""Add trainable long skip connections to any stack, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.connections import Connection, LongSkips
from cachekit.errors import ConfigError, ModelError
from cachekit.fusions import Factory, fusion_name, make_fusion, placed_as, seeded
from cachekit.interceptors import owner_of
from cachekit.pairs import checked_pairs, default_pairs, stack_units, width_of
from cachekit.wrap import beneath

M = TypeVar("M", bound=nn.Module)
NAME = "long_skips"
PREFIX = f"{NAME}."


def add_long_skips(
    model: M,
    *,
    fusion: str | Factory = "residual",
    pairs: Sequence[tuple[int, int]] | None = None,
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
    return connect_long_skips(model, make_long_skips(model, fusion, pairs, seed, width, adapter))


def make_long_skips(
    model: nn.Module,
    fusion: str | Factory,
    pairs: Sequence[tuple[int, int]] | None,
    seed: int | None,
    width: int | None = None,
    adapter: Adapter | str | None = None,
) -> LongSkips:
    """The fusions that a model would get, as in ``add_long_skips``. The model is left as it is."""
    _check_model(model)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed={seed!r}: a seed is a whole number, or None")
    facts = adapter_for(model, adapter)
    units = stack_units(model, facts)
    chosen = default_pairs(len(units)) if pairs is None else checked_pairs(pairs, len(units))
    if not chosen:
        raise ModelError(f"a stack of {len(units)} blocks was found, and long skip connections need two; they stand in ModuleLists")
    made = LongSkips(fusion_name(fusion), chosen, tuple(_connection(model, units, pair, facts, width) for pair in chosen))
    with seeded(seed):
        for connection in made.connections:
            late = model.get_submodule(connection.late)
            made[connection.name] = make_fusion(fusion, connection.width).to(**placed_as(late))
    return made.train(model.training)


def connect_long_skips(model: M, made: LongSkips) -> M:
    """Put fusions into their model, beneath a cache that may be there."""
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


def check_module(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        ModelError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no torch.nn.Module; give the transformer itself, for example pipe.transformer")


def _check_model(model: Any) -> None:
    check_module(model)
    if long_skips_of(model) is not None:
        raise ModelError("the model has long skip connections already; cachekit.remove_long_skips(model) first")
    if hasattr(model, NAME):
        raise ModelError(f"{type(model).__name__} has an attribute {NAME!r} of its own, where the fusions would go")
    for name, module in model.named_modules():
        if name and "cachekit" in module.__dict__:
            raise ModelError(f"its module {name!r} is wrapped; give that one, or cachekit.unwrap it first")


def _check_patches(model: nn.Module, connections: Iterable[Connection]) -> None:
    for late in (model.get_submodule(connection.late) for connection in connections):
        if owner_of(late) is not None:
            raise ModelError("the model is wrapped as a part of another module; cachekit.unwrap that one first")
