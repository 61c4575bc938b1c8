"""What identity can't show of a model: an adapter is a few facts, matched by class name, with no import of any model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from cachekit.errors import ConfigError

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_labels")
VALUE_NAMES = (
    *("to_v", "add_v_proj", "v_proj", "wv", "v", "value"),
    *("to_kv", "kv_proj", "wkv", "kv"),
    *("to_qkv", "to_added_qkv", "qkv_proj", "Wqkv", "qkv"),
)


class Adapter(BaseModel):
    """Facts about a family of backbones. Everything has a default that suits a model nobody has described.

    Attributes:
        name: what the family is called.
        classes: class names that it describes, searched along the model's class hierarchy.
        timestep: name of the timestep argument of ``forward``; None looks for the usual names.
        range: training range of the timestep in the scheduler's units; None where it is unknown.
        scale: the argument times this gives the scheduler's units (1000 where a pipeline passes t / 1000).
        rising: the model's time rises from noise to sample; then t is ``range - scale * argument``.
        stack: regular expression for the paths of the blocks that segments count; None takes every list that is found.
        unit: how many blocks in a row segments count as one (2 for a spatial and a temporal block).
        relayout: (previous, next) regular expressions of blocks between which the model only rearranges the stream.
        adds: regular expression of blocks before which the model adds to the stream, whatever ``relayout`` says.
        main: name of the main stream's argument and its place in what a block returns, where blocks carry several streams.
        per_step: argument names (globs) that hold something new at every step, and so don't tell branches apart.
        attention, cross_attention, mlp: names within a block of these modules. Where neither of the first two is given, or not
            the third, those of other names are found by their class and shape, and what kind an attention is by its call.
        values: names within an attention module of the layers that make value vectors; keys and values one behind the other where
            "kv" is in the name, queries before them where it is "qkv".
        temporal: regular expression for the paths of blocks that attend over time, where others attend over space.
        modulated: names within a block of the module that takes in the block's normed and modulated stream, where that is not its
            attention.
        translate: puts a checkpoint of another repository under the names of this class.
        unneeded: keys (globs) that such a checkpoint may have and the class does without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "automatic"
    classes: tuple[str, ...] = ()
    timestep: str | None = None
    range: PositiveFloat | None = None
    scale: float = 1.0
    rising: bool = False
    stack: str | None = None
    unit: PositiveInt = 1
    relayout: tuple[tuple[str, str], ...] = ()
    adds: str | None = None
    main: tuple[str, NonNegativeInt] | None = None
    per_step: tuple[str, ...] = ("*controlnet*", "*residuals*")
    attention: tuple[str, ...] = Field(default=("attn", "attn1", "self_attn"))
    cross_attention: tuple[str, ...] = Field(default=("cross_attn", "attn2"))
    mlp: tuple[str, ...] = Field(default=("mlp", "ff", "ffn", "ff_context", "feed_forward"))
    values: tuple[str, ...] = Field(default=VALUE_NAMES)
    temporal: str | None = None
    modulated: tuple[str, ...] = ()
    translate: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    unneeded: tuple[str, ...] = ()

    def relayouts(self, previous: str, block: str) -> bool:
        """Whether nothing but the layout changes between these two blocks."""
        if self.adds is not None and re.fullmatch(self.adds, block):
            return False
        return any(re.fullmatch(a, previous) and re.fullmatch(b, block) for a, b in self.relayout)

    def changes_per_step(self, name: str) -> bool:
        """Whether an argument is new at every step."""
        return any(fnmatch(name, glob) for glob in self.per_step)

    def scheduler_time(self, value: float) -> float:
        """A timestep argument's value in the scheduler's units, falling."""
        t = value * self.scale
        return (self.range or 0.0) - t if self.rising else t


def installed_adapters() -> list[Adapter]:
    """The adapters of other packages (entry points ``cachekit.adapters``), then those that come with cachekit.

    A package that can't be loaded is warned of and left out: it must not break models that have nothing to do with it.
    """
    from cachekit.adapters import ADAPTERS

    theirs: list[Adapter] = []
    for entry in entry_points(group="cachekit.adapters"):
        try:
            loaded = entry.load()
        except Exception as error:
            warnings.warn(f"adapter {entry.name!r} of another package can't be loaded from {entry.value}: {error}", stacklevel=3)
        else:
            theirs.extend([loaded] if isinstance(loaded, Adapter) else loaded)
    return [*theirs, *ADAPTERS]


def adapter_for(model: Any, adapter: Adapter | str | None = None, known: Iterable[Adapter] | None = None) -> Adapter:
    """The adapter to use for a model: the one given, else the first that names a class of its hierarchy, else the automatic one.

    Raises:
        ConfigError: a name that no adapter has, or something that is no adapter.
    """
    if isinstance(adapter, Adapter):
        return adapter
    candidates = list(known if known is not None else installed_adapters())
    if isinstance(adapter, str):
        for candidate in candidates:
            if candidate.name == adapter:
                return candidate
        names = ", ".join(sorted({candidate.name for candidate in candidates}))
        raise ConfigError(f"no adapter is called {adapter!r}; known: {names}; or pass cachekit.Adapter(...)")
    if adapter is not None:
        raise ConfigError(f"adapter={adapter!r} is no cachekit.Adapter and no adapter's name")
    for base in type(model).__mro__:
        for candidate in candidates:
            if base.__name__ in candidate.classes:
                return candidate
    return Adapter()
