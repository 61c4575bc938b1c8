"""The targets that come with the package, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from cachekit.demo.target import Target, load_target

# Modules are imported when they are asked for: diffusers' classes take seconds.
SHIPPED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "plain": ("cachekit.demo.fashion", "target"),
        "skip-dit": ("cachekit.demo.fashion", "skip_target"),
        "video": ("cachekit.demo.clips", "target"),
        "video-skip": ("cachekit.demo.clips", "skip_target"),
    }
)


def find_target(where: str, samples: int) -> Target:
    """A shipped target by its name, or one's own as ``package.module:factory``.

    Args:
        where: the name, or where the factory is.
        samples: images or clips for each noise seed, of a shipped one.

    Raises:
        ConfigError: there is no such target, or its weights do not come with this version of the package.
    """
    if where not in SHIPPED:
        return load_target(where, tuple(SHIPPED))
    module, factory = SHIPPED[where]
    made: Target = getattr(importlib.import_module(module), factory)(samples)
    return made
