"""The targets that come with the package, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from cachekit.demo.target import Target, load_target

# Modules are imported when they are asked for: diffusers' classes take seconds.
SHIPPED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "plain": ("cachekit.demo.fashion", "target"),
        "skip-dit": ("cachekit.demo.fashion", "skip_target"),
        "retrofit": ("cachekit.demo.fashion", "retrofit_target"),
        "control": ("cachekit.demo.fashion", "control_target"),
        "video": ("cachekit.demo.clips", "target"),
        "video-skip": ("cachekit.demo.clips", "skip_target"),
    }
)


def find_target(where: str, samples: int) -> Target:
    """A shipped target by its name, with other weights as ``NAME:FILE.safetensors``, or one's own as ``package.module:factory``.

    Args:
        where: the name, or where the factory is.
        samples: images or clips for each noise seed, of a shipped one.

    Raises:
        ConfigError: there is no such target, or its weights do not come with this version of the package.
    """
    name, _, file = where.partition(":")
    if name not in SHIPPED:
        return load_target(where, tuple(SHIPPED))
    module, factory = SHIPPED[name]
    weights = {"weights": Path(file)} if file else {}
    made: Target = getattr(importlib.import_module(module), factory)(samples, **weights)
    return replace(made, name=f"{made.name}, {Path(file).stem}") if file else made
